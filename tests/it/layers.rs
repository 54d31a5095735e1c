//! Checks that imports between modules follow the layer table of `ARCHITECTURE.md`. The compiler
//! cannot check them, because the code is one package.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const BEGIN: &str = "<!-- layers: begin -->";
const END: &str = "<!-- layers: end -->";

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn rust_files(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// Returns the module of a file: `src/store/tx.rs` belongs to `store`, `src/ids.rs` to `ids`.
/// Returns `None` for `lib.rs` and the binaries.
fn module_of(path: &Path) -> Option<String> {
    let below = path.strip_prefix(root().join("src")).unwrap();
    let first = below
        .components()
        .next()?
        .as_os_str()
        .to_str()?
        .trim_end_matches(".rs")
        .to_owned();
    (first != "lib" && first != "bin").then_some(first)
}

/// True if the file contains only tests, which may import anything.
pub fn is_test(path: &Path) -> bool {
    let below = path.strip_prefix(root().join("src")).unwrap();
    below.components().any(|c| {
        let name = c.as_os_str().to_str().unwrap_or_default();
        name == "tests"
            || name == "tests.rs"
            || name.ends_with("_tests.rs")
            || name.starts_with("test_")
    })
}

/// Returns every `crate::<module>` in the text, except in comments.
fn imports(text: &str) -> BTreeSet<String> {
    let code: Vec<&str> = text
        .lines()
        .map(|l| l.split("//").next().unwrap_or(""))
        .collect();
    let code = code.join("\n");
    let mut found = BTreeSet::new();
    for part in code.split("crate::").skip(1) {
        if let Some(group) = part.strip_prefix('{') {
            let group = group.split("};").next().unwrap_or(group);
            let mut depth = 0;
            for item in group.split(|c| match c {
                '{' => {
                    depth += 1;
                    false
                }
                '}' => {
                    depth -= 1;
                    false
                }
                ',' => depth == 0,
                _ => false,
            }) {
                found.insert(item.trim().split("::").next().unwrap_or("").to_owned());
            }
        } else {
            found.insert(
                part.chars()
                    .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                    .collect(),
            );
        }
    }
    found.retain(|m| !m.is_empty());
    found
}

/// Reads the layer table. Its rows are `| modules | what they may import |`, and each cell is a
/// list of names in backticks.
fn table() -> BTreeMap<String, BTreeSet<String>> {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let section = text
        .split(BEGIN)
        .nth(1)
        .and_then(|t| t.split(END).next())
        .expect("the layer table");
    let names = |cell: &str| -> BTreeSet<String> {
        cell.split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect()
    };
    let mut table = BTreeMap::new();
    for row in section.lines().filter(|l| l.starts_with("| `")) {
        let cells: Vec<&str> = row.split('|').collect();
        for module in names(cells[1]) {
            table.insert(module, names(cells[2]));
        }
    }
    table
}

#[test]
fn modules_import_only_what_the_table_allows() {
    let table = table();
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for path in files {
        let Some(module) = module_of(&path) else {
            continue;
        };
        seen.insert(module.clone());
        if is_test(&path) {
            continue;
        }
        let Some(allowed) = table.get(&module) else {
            wrong.push(format!("{module} is not in the table of ARCHITECTURE.md"));
            continue;
        };
        let text = std::fs::read_to_string(&path).unwrap();
        for import in imports(&text) {
            // Other names are macros of this crate or paths within the module.
            let is_module = root().join("src").join(&import).is_dir()
                || root().join("src").join(format!("{import}.rs")).is_file();
            if is_module && import != module && !allowed.contains(&import) {
                wrong.push(format!(
                    "{} imports crate::{import}; {module} may not",
                    path.strip_prefix(root()).unwrap().display()
                ));
            }
        }
    }
    let stale: Vec<_> = table.keys().filter(|m| !seen.contains(*m)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(
        stale.is_empty(),
        "the table names modules that are not in src: {stale:?}"
    );
}

#[test]
fn import_scan_finds_imports() {
    let text = "use crate::{api::vm::{Vm, X}, ids}; // crate::store\nlet x = crate::daemon::Daemon::new();";
    let found: Vec<_> = imports(text).into_iter().collect();
    assert_eq!(found, ["api", "daemon", "ids"]);
}

#[test]
fn op_level_ranks_are_named_in_locks_and_daemon_only() {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    for path in files {
        let module = module_of(&path);
        // The tests of a mechanism take these locks in place of the daemon.
        let is_test = path
            .strip_prefix(root())
            .unwrap()
            .components()
            .any(|c| c.as_os_str().to_string_lossy().starts_with("tests"));
        // The keys of the locks that protect rows.
        let is_key = path.ends_with("src/store/guards.rs");
        if is_test || is_key || matches!(module.as_deref(), Some("locks" | "daemon")) {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for rank in [
            "Rank::Vm)",
            "Rank::Vm,",
            "Rank::Workspace",
            "Rank::CreateVm",
            "Rank::ImageOps",
        ] {
            assert!(!text.contains(rank), "{} names {rank}", path.display());
        }
    }
}

/// Returns the files below `src` whose code names `word`.
fn named_by(word: &str) -> BTreeSet<String> {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    let names = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines()
            .any(|l| l.split("//").next().unwrap_or("").contains(word))
    };
    let below = |path: PathBuf| path.strip_prefix(root()).unwrap().display().to_string();
    files.into_iter().filter(names).map(below).collect()
}

#[test]
fn ssh_is_used_by_helper_process_only() {
    for library in ["ssh2::", "libssh2_sys"] {
        let outside: Vec<_> = named_by(library)
            .into_iter()
            .filter(|path| !path.starts_with("src/guest/ssh/"))
            .collect();
        assert!(
            outside.is_empty(),
            "{library} parses data of guests, but {outside:?} name it"
        );
    }
    // `mod.rs` only declares the module, which these patterns do not match.
    for way in ["guest::ssh", "super::ssh", "ssh::{"] {
        let ways: Vec<_> = named_by(way)
            .into_iter()
            .filter(|path| !path.starts_with("src/guest/ssh/"))
            .collect();
        assert!(
            ways.iter().all(|path| path == "src/guest/helper/serve.rs"),
            "{way}: {ways:?}"
        );
    }
    // Only the list of helpers runs the SSH helper.
    assert_eq!(
        named_by("serve::run"),
        BTreeSet::from(["src/daemon/helpers.rs".to_owned()])
    );
}

#[test]
fn dns_is_parsed_by_helper_process_only() {
    let is_outside = |path: &String| {
        !path.starts_with("src/net/dns/helper/") && !path.starts_with("src/net/dns/tests/")
    };
    // `fuzz.rs` is not part of the daemon.
    for parser in ["packet::", "zone::", "Query::parse", "is_answer"] {
        let parses = |path: &String| {
            path.starts_with("src/net/") && is_outside(path) && path != "src/net/dns/fuzz.rs"
        };
        let outside: Vec<_> = named_by(parser).into_iter().filter(parses).collect();
        assert!(
            outside.is_empty(),
            "{parser} parses data of guests, but {outside:?} name it"
        );
    }
    // Only the list of helpers runs the DNS helper.
    let ways: Vec<_> = named_by("dns::helper::")
        .into_iter()
        .filter(is_outside)
        .collect();
    assert_eq!(ways, ["src/daemon/helpers.rs"]);
}
