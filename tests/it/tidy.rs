//! Checks the language of comments, texts, test names and Markdown where a pattern can find a
//! fault.
//!
//! The patterns are phrases that made an earlier version of this code hard to read. Texts write VM
//! and VMM in capitals, and comments are at most [`COMMENT_WIDTH`] columns wide. A directory that
//! still has findings has an entry in [`REMAINING`], [`REMAINING_VM`] or [`REMAINING_WIDTH`], and
//! its number may only fall.

use crate::layers::{is_test, root, rust_files};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Phrases that have a plainer form, each with that form.
const PHRASES: &[(&str, &str)] = &[
    ("is no ", "is not a"),
    ("are no ", "are not"),
    ("stands still", "is paused, waits"),
    ("stand still", "pause, wait"),
    ("goes on", "continues, resumes"),
    ("go on ", "continue, resume"),
    ("let go", "release, resume"),
    (" told", "reported, sent, asked"),
    ("by and by", "gradually"),
    ("whence", "where from"),
    ("of the host's,", "of the host"),
    ("of the host's.", "of the host"),
    ("of the host's:", "of the host"),
    ("anew", "again"),
    ("in earnest", "in production"),
    ("besides", "also"),
    ("hoever", "whichever caller"),
    ("put right", "restored"),
    ("struck off", "removed"),
    ("as it stands", "as it is"),
    ("as they stand", "as they are"),
    ("looked after", "managed"),
    ("so many ", "that many, or a name"),
    ("by itself of", "of its own"),
];

/// Good texts that contain one of the phrases.
const ALLOWED: &[&str] = &[
    "here is no ",
    "here are no ",
    "are no longer",
    "is no longer",
    "in so many ",
];

/// First words that make a comment a fragment.
const FRAGMENTS: &[&str] = &[
    "Of ", "That ", "So ", "Whoever ", "As ", "What ", "Which ", "Whether ",
];

/// The number of findings that a module still has. Lower a number when you rewrite a text; never
/// raise one.
const REMAINING: &[(&str, usize)] = &[];

/// The number of texts in a module that still contain `vm` or `vmm` as a word. Numbers may only
/// fall.
const REMAINING_VM: &[(&str, usize)] = &[];

/// The number of comment lines in a module that are still wider than [`COMMENT_WIDTH`]. Numbers may
/// only fall.
const REMAINING_WIDTH: &[(&str, usize)] = &[];

/// Longest line of a comment, including its indentation.
const COMMENT_WIDTH: usize = 100;

/// Words that must be written in capitals, except for a plural's `s`.
const VM_WORDS: &[&str] = &["vm", "vms", "vmm", "vmms", "vm's", "vmm's"];

/// Texts that begin with one of these words are arguments of `fcctl`, shell or SQL.
const COMMANDS: &[&str] = &[
    "vm set",
    "vm resume",
    "for vm in",
    "SELECT ",
    "UPDATE ",
    "DELETE ",
    "INSERT ",
    "CREATE ",
];

/// Hand-written Markdown with prose.
const MARKDOWN: &[&str] = &["README.md", "ARCHITECTURE.md", "src/docs"];

/// Longest line of Markdown prose. Tables and code may be longer.
const MARKDOWN_WIDTH: usize = 100;

/// A piece of a source file that people read.
#[derive(Debug, PartialEq)]
enum Piece {
    /// A comment line. `is_first` is true if it begins a comment.
    Comment { text: String, is_first: bool },
    /// A string literal.
    Text(String),
    /// The name of a function with `#[test]`.
    TestName(String),
}

/// Returns the comments, texts and test names of a Rust source with their line numbers.
fn pieces(source: &str) -> Vec<(usize, Piece)> {
    let (mut found, mut after_comment, mut is_test) = (Vec::new(), false, false);
    let mut in_string: Option<String> = None;
    for (number, line) in source.lines().enumerate() {
        let trimmed = line.trim_start();
        if in_string.is_none()
            && let Some(comment) = trimmed.strip_prefix("//")
        {
            let text = comment
                .trim_start_matches(['/', '!'])
                .trim_start()
                .to_owned();
            found.push((
                number + 1,
                Piece::Comment {
                    text,
                    is_first: !after_comment,
                },
            ));
            after_comment = true;
            continue;
        }
        after_comment = false;
        if in_string.is_none() && trimmed.starts_with("#[test]") {
            is_test = true;
        }
        if is_test && let Some(rest) = trimmed.strip_prefix("fn ") {
            let name: String = rest
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            found.push((number + 1, Piece::TestName(name.replace('_', " ") + " ")));
            is_test = false;
        }
        texts(line, number + 1, &mut in_string, &mut found);
    }
    found
}

/// Collects the string literals of one line. `open` holds the text of a literal that began on an
/// earlier line.
fn texts(line: &str, number: usize, open: &mut Option<String>, found: &mut Vec<(usize, Piece)>) {
    let mut chars = line.trim_start().chars().peekable();
    while let Some(c) = chars.next() {
        match (&mut *open, c) {
            (Some(text), '"') => {
                found.push((number, Piece::Text(std::mem::take(text))));
                *open = None;
            }
            (Some(text), '\\') => text.extend(chars.next().filter(|c| !c.is_control())),
            (Some(text), c) => text.push(c),
            (None, '"') => *open = Some(String::new()),
            (None, '/') if chars.peek() == Some(&'/') => return,
            // A character literal may be a quote.
            (None, '\'') => {
                let mut ahead = chars.clone();
                let (first, second) = (ahead.next(), ahead.next());
                let skipped = match (first, second) {
                    (Some('\\'), Some(_)) => 3,
                    (Some(_), Some('\'')) => 2,
                    _ => 0,
                };
                for _ in 0..skipped {
                    chars.next();
                }
            }
            (None, _) => {}
        }
    }
}

/// Returns the faults of one piece.
fn findings(piece: &Piece) -> Vec<String> {
    let (text, is_first) = match piece {
        Piece::Comment { text, is_first } => (text, *is_first),
        Piece::Text(text) | Piece::TestName(text) => (text, false),
    };
    let mut plain = text.clone();
    for allowed in ALLOWED {
        plain = plain.replace(allowed, "");
    }
    let mut found: Vec<String> = Vec::new();
    for (phrase, better) in PHRASES.iter().filter(|(phrase, _)| plain.contains(phrase)) {
        found.push(format!("\"{}\": write \"{better}\"", phrase.trim()));
    }
    for word in FRAGMENTS
        .iter()
        .filter(|word| is_first && text.starts_with(**word))
    {
        found.push(format!(
            "a comment begins with \"{}\": write a sentence with a subject and a verb",
            word.trim()
        ));
    }
    found
}

/// Returns the module of a file: `src/cli` for `src/cli/vm.rs`.
fn module(path: &Path) -> String {
    let parts: Vec<_> = path
        .components()
        .take(2)
        .map(|part| part.as_os_str().to_string_lossy())
        .collect();
    parts.join("/")
}

/// Returns the words of a text that must be in capitals. JSON members, paths, identifiers,
/// arguments of `fcctl` and names of tables do not count.
fn lower_case_vms(text: &str) -> Vec<&str> {
    if !text.contains(' ')
        || COMMANDS
            .iter()
            .any(|command| text.trim_start().starts_with(command))
    {
        return Vec::new();
    }
    let (mut found, mut is_command, mut before) = (Vec::new(), false, "");
    for token in text.split_whitespace() {
        let word = token
            .trim_start_matches('(')
            .trim_end_matches([')', ',', ';', ':', '.', '!', '?']);
        is_command = (is_command || word == "fcctl") && word == token;
        if !is_command && before != "table" && VM_WORDS.contains(&word) {
            found.push(word);
        }
        before = token;
    }
    found
}

/// The findings of each module.
#[derive(Default)]
struct Findings(BTreeMap<String, Vec<String>>);

impl Findings {
    fn add(&mut self, path: &Path, line: usize, finding: &str) {
        self.0
            .entry(module(path))
            .or_default()
            .push(format!("{}:{line}: {finding}", path.display()));
    }

    /// Compares the findings with the allowed numbers, which must match exactly. Returns one
    /// message per difference.
    fn compare(&self, list: &str, remaining: &[(&str, usize)]) -> Vec<String> {
        let mut wrong = Vec::new();
        for (module, found) in &self.0 {
            let allowed = remaining
                .iter()
                .find(|(name, _)| name == module)
                .map_or(0, |(_, count)| *count);
            if found.len() > allowed {
                let all = found.join("\n  ");
                wrong.push(format!(
                    "{module} has {} findings, {list} allows {allowed}:\n  {all}",
                    found.len()
                ));
            }
        }
        for (module, count) in remaining {
            let now = self.0.get(*module).map_or(0, Vec::len);
            if now < *count {
                wrong.push(format!(
                    "{module} has only {now} findings left: lower its number in {list} from {count}"
                ));
            }
        }
        wrong
    }
}

/// Calls `each` with the path, source and pieces of every Rust file except this one.
fn for_each_source(mut each: impl FnMut(&Path, &str, &[(usize, Piece)])) {
    for dir in ["src", "tests"] {
        let mut paths = Vec::new();
        rust_files(&root().join(dir), &mut paths);
        for path in paths
            .into_iter()
            .filter(|path| !path.ends_with("it/tidy.rs"))
        {
            let source = std::fs::read_to_string(&path).unwrap();
            each(
                path.strip_prefix(root()).unwrap(),
                &source,
                &pieces(&source),
            );
        }
    }
}

#[test]
fn code_reads_as_plain_english() {
    let mut all = Findings::default();
    for_each_source(|path, _, pieces| {
        for (line, piece) in pieces {
            findings(piece)
                .iter()
                .for_each(|finding| all.add(path, *line, finding));
        }
    });
    let wrong = all.compare("REMAINING", REMAINING);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn texts_write_vm_in_capitals() {
    let mut all = Findings::default();
    for_each_source(|path, _, pieces| {
        for (line, piece) in pieces {
            let Piece::Text(text) = piece else { continue };
            for word in lower_case_vms(text) {
                all.add(
                    path,
                    *line,
                    &format!("\"{word}\" in \"{text}\": write it in capitals"),
                );
            }
        }
    });
    let wrong = all.compare("REMAINING_VM", REMAINING_VM);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Returns the comment lines of a source that are too long. Tables may be longer.
fn wide_comments(source: &str, pieces: &[(usize, Piece)]) -> Vec<usize> {
    let lines: Vec<&str> = source.lines().collect();
    let is_prose =
        |piece: &Piece| matches!(piece, Piece::Comment { text, .. } if !text.starts_with('|'));
    let comments = pieces
        .iter()
        .filter(|(_, piece)| is_prose(piece))
        .map(|(line, _)| *line);
    comments
        .filter(|line| lines[line - 1].chars().count() > COMMENT_WIDTH)
        .collect()
}

#[test]
fn comments_fit_their_width() {
    let mut all = Findings::default();
    for_each_source(|path, source, pieces| {
        for line in wide_comments(source, pieces) {
            all.add(
                path,
                line,
                &format!("a comment of more than {COMMENT_WIDTH} columns"),
            );
        }
    });
    let wrong = all.compare("REMAINING_WIDTH", REMAINING_WIDTH);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Returns every Markdown file that [`MARKDOWN`] names, and those in directories that it names.
fn markdown_files() -> Vec<std::path::PathBuf> {
    let paths = MARKDOWN.iter().map(|name| root().join(name));
    let in_dir = |path: std::path::PathBuf| match std::fs::read_dir(&path) {
        Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
        Err(_) => vec![path],
    };
    paths.flat_map(in_dir).collect()
}

/// Returns the lines of prose, without code, tables and comments.
fn prose(text: &str) -> Vec<(usize, &str)> {
    let (mut lines, mut is_fenced) = (Vec::new(), false);
    for (number, line) in text.lines().enumerate() {
        if line.starts_with("```") {
            is_fenced = !is_fenced;
        } else if !is_fenced
            && !line.starts_with("    ")
            && !line.starts_with('|')
            && !line.starts_with("<!--")
        {
            lines.push((number + 1, line));
        }
    }
    lines
}

#[test]
fn markdown_reads_as_plain_english() {
    let mut wrong = Vec::new();
    for path in markdown_files() {
        let text = std::fs::read_to_string(&path).unwrap();
        let place = path.strip_prefix(root()).unwrap().display();
        for (number, line) in prose(&text) {
            let piece = Piece::Text(line.to_owned());
            wrong.extend(
                findings(&piece)
                    .into_iter()
                    .map(|finding| format!("{place}:{number}: {finding}")),
            );
            if line.chars().count() > MARKDOWN_WIDTH {
                wrong.push(format!(
                    "{place}:{number}: more than {MARKDOWN_WIDTH} columns"
                ));
            }
            for named in line
                .split('`')
                .skip(1)
                .step_by(2)
                .filter(|named| is_repository_path(named))
            {
                if !root().join(named.trim_end_matches('/')).exists() {
                    wrong.push(format!(
                        "{place}:{number}: {named} is not in the repository"
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// True if a piece of code in Markdown names a file of this repository.
fn is_repository_path(text: &str) -> bool {
    ["src/", "tests/", "scripts/"]
        .iter()
        .any(|dir| text.starts_with(dir))
        && !text.contains([' ', '*', '<', '{'])
        && !text.contains("NAME")
        && !text.contains("NOUN")
}

#[test]
fn mutants_of_lower_case_vm_are_found() {
    for text in [
        "start vm {name}",
        "no vm web",
        "the vmm died: {exit}",
        "vms are paused",
        "stop it (with its vm)",
        "fcctl: no vm",
    ] {
        assert_eq!(lower_case_vms(text).len(), 1, "{text}");
    }
    for text in [
        "vm",
        "start VM {vm}: see /vm/log",
        "{\"vm\": \"web\"}",
        "NAME.vm is unknown",
        "run fcctl vm show",
        "fcctl --json vm restart, or wait",
        "SELECT vm FROM vms",
        "read a row of table vms",
    ] {
        assert_eq!(lower_case_vms(text), [""; 0], "{text}");
    }
}

/// The tables of `scripts/mutants` quote the sources. After a change of a quoted line, its mutant
/// would no longer be tried.
#[test]
fn tables_of_mutants_match_the_sources() {
    let checked = std::process::Command::new(root().join("scripts/mutants"))
        .arg("--check")
        .output()
        .unwrap();
    assert!(
        checked.status.success(),
        "edit tests/mutants/*.txt:\n{}",
        String::from_utf8_lossy(&checked.stderr)
    );
}

#[test]
fn mutants_of_wide_comments_are_found() {
    let comment = |width: usize| format!("let x = 1;\n    //{}\n", "x".repeat(width - 6));
    for (width, found) in [(COMMENT_WIDTH, vec![]), (COMMENT_WIDTH + 1, vec![2])] {
        let source = comment(width);
        assert_eq!(wide_comments(&source, &pieces(&source)), found, "{width}");
    }
}

#[test]
fn mutants_of_plain_english_are_found() {
    let source = "\
// Of a VM: its root disk.
/// A reader that is no pipe.
// There is no file.
let quote = '\"'; let text = \"the vm goes on\"; // let go
#[test]
fn a_guest_stands_still() {}
let long = \"one \\
    told\";
/// What `--quiet` prints.
";
    let wrong: Vec<(usize, usize)> = pieces(source)
        .iter()
        .map(|(line, piece)| (*line, findings(piece).len()))
        .filter(|(_, count)| *count > 0)
        .collect();
    assert_eq!(wrong, [(1, 1), (2, 1), (4, 1), (6, 1), (8, 1), (9, 1)]);
}

/// Files that compare the text of another program because the program has no other output, with the
/// name of the program. A comment in each file names the version and source file of the text. This
/// test does not see `host/strerror.rs` (for the C library) and `vmm/firecracker/refusal.rs`, which
/// use tables.
const FOREIGN_TEXTS: &[(&str, &str)] = &[
    (
        "src/cli/registry_auth/helper.rs",
        "docker's credential helpers",
    ),
    ("src/image/apt_texts.rs", "mmdebstrap and apt"),
    ("src/vmm/end.rs", "Linux"),
    ("src/vmm/qemu/accel.rs", "Linux"),
    ("src/vmm/qemu/checks.rs", "QEMU"),
    ("src/vmm/vmm_log.rs", "QEMU"),
    ("src/workspace/git_texts.rs", "git"),
];

/// Methods that compare a text or search in it.
const COMPARISONS: &[&str] = &[
    "contains(",
    "starts_with(",
    "ends_with(",
    "strip_prefix(",
    "strip_suffix(",
    "split_once(",
    "rsplit_once(",
    "find(",
    "rfind(",
    "eq(",
    " == ",
    " != ",
];

/// Methods that return an error's text for people.
const FOR_PEOPLE: &[&str] = &[".message()", ".to_string()", ".hint_text()"];

/// True if a literal is written for people, that is, has two words separated by a space.
fn is_phrase(literal: &str) -> bool {
    let words: Vec<&str> = literal.split(' ').collect();
    let is_word = |word: &&str| word.chars().filter(|c| c.is_alphabetic()).count() >= 2;
    words.windows(2).any(|pair| pair.iter().all(is_word))
}

/// Returns the string literal at the beginning of `code` without its quotes, or `None` if there is
/// none. Byte strings are parts of file formats and do not count.
fn literal(code: &str) -> Option<&str> {
    code.trim_start_matches("Some(")
        .trim_start_matches('&')
        .strip_prefix('"')
        .and_then(|rest| rest.split('"').next())
}

/// Returns the part of a source file before its tests.
fn production(source: &str) -> &str {
    source
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or(source)
}

/// Returns the names of constants whose value is a phrase.
fn phrase_names(source: &str) -> BTreeSet<String> {
    let constants = production(source).lines().filter_map(|line| {
        let line = line.trim_start();
        let (visibility, rest) = line.split_once("const ")?;
        (visibility.is_empty() || visibility.starts_with("pub")).then_some(rest)
    });
    let phrases = constants.filter(|rest| {
        rest.split_once("= ")
            .and_then(|(_, value)| literal(value))
            .is_some_and(is_phrase)
    });
    phrases
        .filter_map(|rest| rest.split(':').next().map(str::to_owned))
        .collect()
}

/// Returns the lines of production code that decide by a text for people or by one of the constants
/// `names`.
fn decisions_by_text(source: &str, names: &BTreeSet<String>) -> Vec<usize> {
    let mut found = Vec::new();
    for (number, line) in production(source).lines().enumerate() {
        let line = if line.trim_start().starts_with("//") {
            ""
        } else {
            line
        };
        let decides = COMPARISONS.iter().any(|comparison| {
            line.match_indices(comparison).any(|(at, _)| {
                let (before, after) = (
                    line[..at].trim_end_matches('.'),
                    &line[at + comparison.len()..],
                );
                let is_name = |name: &String| {
                    after.strip_prefix(name.as_str()).is_some_and(|rest| {
                        !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_')
                    })
                };
                FOR_PEOPLE.iter().any(|text| before.ends_with(text))
                    || literal(after).is_some_and(is_phrase)
                    || names.iter().any(is_name)
            })
        });
        if decides {
            found.push(number + 1);
        }
    }
    found
}

/// Rewording a message must not change behaviour. Decide by a kind, by an enum or by the source of
/// an error (`Error::source_as`).
#[test]
fn production_code_never_decides_by_message_text() {
    let mut paths = Vec::new();
    rust_files(&root().join("src"), &mut paths);
    paths.retain(|path| !is_test(path) && !path.ends_with("fake.rs"));
    let sources: Vec<_> = paths
        .iter()
        .map(|path| (path, std::fs::read_to_string(path).unwrap()))
        .collect();
    let names = sources
        .iter()
        .flat_map(|(_, source)| phrase_names(source))
        .collect();
    let (mut wrong, mut unused) = (
        Vec::new(),
        BTreeMap::from_iter(FOREIGN_TEXTS.iter().copied()),
    );
    for (path, source) in &sources {
        let short = path.strip_prefix(root()).unwrap().display().to_string();
        let lines = decisions_by_text(source, &names);
        if lines.is_empty() || unused.remove(short.as_str()).is_some() {
            continue;
        }
        wrong.extend(lines.into_iter().map(|line| format!("{short}:{line}")));
    }
    assert!(
        wrong.is_empty(),
        "these lines decide by a text for people:\n{}",
        wrong.join("\n")
    );
    assert!(
        unused.is_empty(),
        "these files decide by no text any more, so remove them from FOREIGN_TEXTS: {unused:?}"
    );
}

#[test]
fn decisions_by_text_are_found() {
    let source = r#"
const HUNG_UP: &str = "the caller hung up";
fn a(e: &Error) -> bool { e.message() == HUNG_UP }
fn b(e: &Error) -> bool { e.to_string().contains(&name) }
fn c(text: &str) -> bool { text.starts_with("no space left") }
fn d(row: &Row) -> bool { row.reason.as_ref().is_some_and(|r| r.starts_with(HUNG_UP)) }
fn e(cause: Option<&str>) -> bool { cause != Some("the VM was stopped") }
fn fine(e: &Error) -> bool { e.kind() == Kind::Busy && name.starts_with("fc-") && format!("{HUNG_UP} twice") == name }
#[cfg(test)]
mod tests {
    fn f() { assert!(e.to_string().contains("the VM was stopped")); }
}
"#;
    assert_eq!(
        decisions_by_text(source, &phrase_names(source)),
        [3, 4, 5, 6, 7]
    );
}
