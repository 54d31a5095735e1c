//! Checks the shape of the code: which files of a directory may import each other, and how large a
//! type may grow. The compiler checks neither.

use crate::layers::{is_test, root, rust_files};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Limit of the methods of one type in one file.
const METHODS_PER_FILE_MAX: usize = 15;
/// Limit of the fields of a tuple in a signature or a type alias. A larger tuple needs named
/// fields.
const TUPLE_FIELDS_MAX: usize = 2;
/// Limit of the methods of `Daemon` in all files together.
const DAEMON_METHODS_MAX: usize = 40;

type Graph = BTreeMap<String, BTreeSet<String>>;

/// Returns the source without comments and without the test module at its end.
fn code_of(text: &str) -> String {
    let text = text
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or(text);
    text.lines()
        .map(|line| line.split("//").next().unwrap_or(""))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Returns the first name of each path in `code` that begins with `prefix`, also in groups:
/// `super::{a::B, c}` gives `a` and `c`.
fn first_names(code: &str, prefix: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for (at, _) in code.match_indices(prefix) {
        if code[..at].ends_with(|c: char| is_name(c) || c == ':') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.insert(rest.chars().take_while(|c| is_name(*c)).collect());
            continue;
        };
        let (mut depth, mut name) = (0, String::new());
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => found.extend(first_name(&std::mem::take(&mut name))),
                _ if depth == 0 => name.push(c),
                _ => {}
            }
        }
        found.extend(first_name(&name));
    }
    found.remove("");
    found
}

fn first_name(path: &str) -> Option<String> {
    path.trim()
        .split([':', ' '])
        .next()
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
}

/// Returns which entries of a directory import which others. An entry is a file, or a directory
/// with everything in it. `mod.rs` is left out because it declares the other entries.
fn graph_of(dir: &Path) -> Graph {
    let mut graph = Graph::new();
    let mut files = Vec::new();
    rust_files(dir, &mut files);
    let path_of = dir
        .strip_prefix(root().join("src"))
        .unwrap()
        .display()
        .to_string()
        .replace('/', "::");
    for file in files.iter().filter(|file| !is_test(file)) {
        let below = file.strip_prefix(dir).unwrap();
        let parts: Vec<String> = below
            .components()
            .map(|c| c.as_os_str().to_string_lossy().into_owned())
            .collect();
        let entry = parts[0].trim_end_matches(".rs").to_owned();
        if entry == "mod" {
            continue;
        }
        let code = code_of(&std::fs::read_to_string(file).unwrap());
        let depth = parts.len() - usize::from(parts.last().is_some_and(|name| name == "mod.rs"));
        let mut names = first_names(&code, &"super::".repeat(depth));
        names.extend(first_names(&code, &format!("crate::{path_of}::")));
        names.remove(&entry);
        graph.entry(entry).or_default().extend(names);
    }
    let entries: BTreeSet<String> = graph.keys().cloned().collect();
    graph
        .values_mut()
        .for_each(|names| names.retain(|name| entries.contains(name)));
    graph
}

/// Returns a cycle of imports, or `None` if there is none.
fn circle(graph: &Graph) -> Option<Vec<String>> {
    fn walk(graph: &Graph, path: &mut Vec<String>, done: &mut BTreeSet<String>) -> bool {
        let at = path.last().expect("the path is not empty").clone();
        for next in &graph[&at] {
            if let Some(start) = path.iter().position(|name| name == next) {
                path.drain(..start);
                path.push(next.clone());
                return true;
            }
            if done.contains(next) {
                continue;
            }
            path.push(next.clone());
            if walk(graph, path, done) {
                return true;
            }
            path.pop();
        }
        done.insert(at);
        false
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|start| {
        let mut path = vec![start.clone()];
        (!done.contains(start) && walk(graph, &mut path, &mut done)).then_some(path)
    })
}

fn directories(dir: &Path, into: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            directories(&path, into);
            into.push(path);
        }
    }
}

#[test]
fn imports_in_a_directory_run_one_way() {
    let mut all = Vec::new();
    directories(&root().join("src"), &mut all);
    let found: BTreeMap<String, String> = all
        .iter()
        .filter_map(|dir| {
            let below = dir.strip_prefix(root()).unwrap().display().to_string();
            Some((below, circle(&graph_of(dir))?.join(" -> ")))
        })
        .collect();
    assert!(
        found.is_empty(),
        "files that import each other in a circle: {found:#?}"
    );
}

#[test]
fn circle_is_found() {
    let graph = |edges: &[(&str, &[&str])]| -> Graph {
        edges
            .iter()
            .map(|(from, to)| {
                (
                    (*from).to_owned(),
                    to.iter().map(|to| (*to).to_owned()).collect(),
                )
            })
            .collect()
    };
    assert_eq!(
        circle(&graph(&[("a", &["b", "c"]), ("b", &["c"]), ("c", &[])])),
        None
    );
    let found = circle(&graph(&[("a", &["b"]), ("b", &["c"]), ("c", &["b"])])).unwrap();
    assert_eq!(found, ["b", "c", "b"]);
}

#[test]
fn first_names_are_read_from_paths_and_groups() {
    let code = "use super::{a::{B, C}, d};\nlet x = super::e::f(super::super::g);\nuse crate::daemon::h::I;";
    assert_eq!(
        Vec::from_iter(first_names(code, "super::")),
        ["a", "d", "e", "super"]
    );
    assert_eq!(Vec::from_iter(first_names(code, "crate::daemon::")), ["h"]);
}

/// `mod.rs` explains the life of a VM. Items there would make its child modules depend on it.
#[test]
fn root_of_daemon_has_no_items_of_its_own() {
    let code = code_of(&std::fs::read_to_string(root().join("src/daemon/mod.rs")).unwrap());
    let items: Vec<&str> = code
        .lines()
        .filter(|line| line.contains("fn ") || line.contains("struct "))
        .collect();
    assert_eq!(items, [""; 0], "move these into a file of their own");
}

/// Returns the number of methods of each type, without those of trait implementations.
fn methods(text: &str) -> BTreeMap<String, usize> {
    let (mut counts, mut of): (BTreeMap<String, usize>, Option<String>) = (BTreeMap::new(), None);
    for line in code_of(text).lines() {
        if line.starts_with("impl") {
            let head = line
                .split(" for ")
                .last()
                .unwrap_or(line)
                .trim_start_matches("impl")
                .trim();
            let head = if head.starts_with('<') {
                head.split_once("> ").map_or(head, |(_, rest)| rest)
            } else {
                head
            };
            // Trait implementations do not count, because the trait decides how many methods they
            // have.
            of = (!line.contains(" for ")).then(|| {
                head.split(['<', ' ', '{'])
                    .next()
                    .unwrap_or_default()
                    .to_owned()
            });
        } else if line == "}" {
            of = None;
        } else if let Some(of) = &of {
            let item = line.strip_prefix("    ").unwrap_or_default();
            let item =
                item.strip_prefix("pub ")
                    .unwrap_or_else(|| match item.strip_prefix("pub(") {
                        Some(rest) => rest.split_once(") ").map_or(item, |(_, rest)| rest),
                        None => item,
                    });
            *counts.entry(of.clone()).or_default() += usize::from(
                item.starts_with("fn ")
                    || item.starts_with("const fn ")
                    || item.starts_with("unsafe fn "),
            );
        }
    }
    counts
}

#[test]
fn types_stay_small() {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    let (mut large, mut of_daemon) = (BTreeSet::new(), 0);
    for file in files.iter().filter(|file| !is_test(file)) {
        for (name, count) in methods(&std::fs::read_to_string(file).unwrap()) {
            of_daemon += if name == "Daemon" { count } else { 0 };
            if count > METHODS_PER_FILE_MAX {
                large.insert(format!(
                    "{}: {name}",
                    file.strip_prefix(root()).unwrap().display()
                ));
            }
        }
    }
    assert_eq!(
        large,
        BTreeSet::new(),
        "types with more than {METHODS_PER_FILE_MAX} methods in one file"
    );
    assert!(
        of_daemon <= DAEMON_METHODS_MAX,
        "Daemon has {of_daemon} methods, at most {DAEMON_METHODS_MAX} are allowed"
    );
}

#[test]
fn methods_are_counted_per_type() {
    let text = "impl<'a> A<'a> {\n    fn a() {}\n    pub(super) fn b() {\n        fn inner() {}\n    }\n}\nimpl T for A {\n    fn c() {}\n}\nimpl B {\n    pub const fn d() {}\n}\n";
    assert_eq!(
        Vec::from_iter(methods(text)),
        [("A".to_owned(), 2), ("B".to_owned(), 1)]
    );
}

/// Returns the signatures of functions and the type aliases in `code`.
fn signatures(code: &str) -> Vec<&str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let starts = ["fn ", "type "].into_iter().flat_map(|keyword| {
        code.match_indices(keyword)
            .map(|(at, _)| at)
            .filter(|at| !code[..*at].ends_with(is_name))
    });
    starts
        .map(|start| {
            let mut depth = 0;
            let end = code[start..].find(|c| {
                match c {
                    '(' | '[' => depth += 1,
                    ')' | ']' => depth -= 1,
                    _ => {}
                }
                depth == 0 && (c == '{' || c == ';')
            });
            &code[start..end.map_or(code.len(), |end| start + end)]
        })
        .collect()
}

/// Returns the tuples in a signature that have too many fields. A parameter list is not a tuple: a
/// name or its generics precede it.
fn wide_tuples(signature: &str) -> Vec<&str> {
    struct Open {
        at: usize,
        bracket: char,
        commas: usize,
    }
    let (mut open, mut found): (Vec<Open>, Vec<&str>) = (Vec::new(), Vec::new());
    for (at, c) in signature.char_indices() {
        match c {
            '(' | '[' | '{' | '<' => open.push(Open {
                at,
                bracket: c,
                commas: 0,
            }),
            '>' if signature[..at].ends_with(['-', '=']) => {}
            ')' | ']' | '}' | '>' => {
                let Some(closed) = open.pop() else { continue };
                let before = signature[..closed.at].trim_end();
                let word =
                    before.rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '\'');
                let word = word.into_iter().next().unwrap_or_default();
                let is_list = (!word.is_empty() && word != "mut" && !word.starts_with('\''))
                    || (before.ends_with('>') && !before.ends_with("->"));
                if closed.bracket == '(' && !is_list && closed.commas >= TUPLE_FIELDS_MAX {
                    found.push(&signature[closed.at..=at]);
                }
            }
            ',' if !signature[at + 1..].trim_start().starts_with([')', '>']) => {
                if let Some(innermost) = open.last_mut() {
                    innermost.commas += 1;
                }
            }
            _ => {}
        }
    }
    found
}

#[test]
fn tuples_in_signatures_stay_small() {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    let mut found = BTreeSet::new();
    for file in files.iter().filter(|file| !is_test(file)) {
        let code = code_of(&std::fs::read_to_string(file).unwrap());
        for tuple in signatures(&code).into_iter().flat_map(wide_tuples) {
            let tuple = tuple.split_whitespace().collect::<Vec<_>>().join(" ");
            found.insert(format!(
                "{}: {tuple}",
                file.strip_prefix(root()).unwrap().display()
            ));
        }
    }
    assert_eq!(
        found,
        BTreeSet::new(),
        "tuples of more than {TUPLE_FIELDS_MAX} fields: give the fields names"
    );
}

#[test]
fn wide_tuples_are_found_in_signatures() {
    let of = |code: &str| -> Vec<String> {
        let found = signatures(code).into_iter().flat_map(wide_tuples);
        found.map(str::to_owned).collect()
    };
    let none = [""; 0];
    assert_eq!(of("fn a() -> (u8, u16, u32) {}"), ["(u8, u16, u32)"]);
    assert_eq!(
        of("fn a(&self, b: &'a (A, B<C, D>, [u8; 4])) {}"),
        ["(A, B<C, D>, [u8; 4])"]
    );
    assert_eq!(
        of("type A = (u8,\n    u16,\n    u32,\n);"),
        ["(u8,\n    u16,\n    u32,\n)"]
    );
    assert_eq!(of("fn a<T>((b, c, d): T) {}"), ["(b, c, d)"]);
    assert_eq!(of("fn a<T>(b: Vec<(u8, T, u8)>) {}"), ["(u8, T, u8)"]);
    assert_eq!(
        of("fn a<F: Fn(A, B, C) -> D>(b: u8, c: u8, d: F) -> (HashMap<A, B>, u8) {}"),
        none
    );
    assert_eq!(
        of("pub(super) fn a(\n    b: u8,\n    c: u8,\n) -> (u8, u8,) { f(1, 2, (3, 4, 5)) }"),
        none
    );
    assert_eq!(
        of("fn a(b: fn(u8, u8, u8)) -> Result<A, B> where C: FnMut(A, B, C) {}"),
        none
    );
}
