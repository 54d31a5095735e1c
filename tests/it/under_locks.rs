//! Checks that code under a lock only accesses memory. The lock checker sees only the code that
//! runs, and only what says that it may block. These tests read the source: most log calls are on
//! paths that no test takes, and a function that touches a file must say so.

use crate::layers::{is_test, root, rust_files};

/// Texts that are forbidden while a guard is in scope. `log::` stands for any log macro.
const FORBIDDEN: [&str; 1] = ["log::"];

/// A guard in scope: its name, if it has one, and the brace depth at which its scope ends.
struct Guard {
    name: String,
    ends_below: i32,
}

/// Returns the name of the guard if a statement binds one: `let guard = self.locks.vm.lock(&id);`.
fn bound_guard(line: &str) -> Option<&str> {
    let (name, value) = line.trim().strip_prefix("let ")?.split_once(" = ")?;
    let value = value.trim_end().trim_end_matches(';').trim_end_matches('?');
    let is_guard = [".lock(", ".try_lock(", ".lock_cancellable("]
        .iter()
        .any(|call| {
            value
                .rsplit_once(call)
                .is_some_and(|(_, args)| args.find(')').is_some_and(|end| end + 1 == args.len()))
        });
    is_guard.then(|| name.trim_start_matches("mut ").trim_start_matches('_'))
}

/// True if the block that the line opens runs under a lock. It is a section of the store, or the
/// head of a `match`, `if let`, `while let` or `for` creates a guard that lives as long as the
/// block.
fn opens_section(line: &str) -> bool {
    let line = line.trim();
    if !line.ends_with('{') {
        return false;
    }
    let holds_temporary = ["match ", "if let ", "while let ", "for "]
        .iter()
        .any(|head| line.starts_with(head));
    line.ends_with("|tx| {")
        || line.ends_with(".read(|s| {")
        || (holds_temporary && line.contains(".lock()"))
}

/// Returns the numbers of the lines that use a forbidden text while a guard is in scope.
fn offences(text: &str) -> Vec<usize> {
    let (mut depth, mut guards, mut found) = (0i32, Vec::<Guard>::new(), Vec::new());
    let mut signature = String::new();
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        if code.trim_start().contains("fn ") && code.contains('(') {
            signature.clear();
        }
        signature += code;
        if !guards.is_empty() && FORBIDDEN.iter().any(|call| code.contains(call)) {
            found.push(number + 1);
        }
        if let Some(name) = bound_guard(code) {
            guards.push(Guard {
                name: name.to_owned(),
                ends_below: depth,
            });
        }
        for c in code.chars() {
            depth += match c {
                '{' => 1,
                '}' => -1,
                _ => 0,
            };
            guards.retain(|guard| depth >= guard.ends_below);
        }
        if opens_section(code) {
            guards.push(Guard {
                name: String::new(),
                ends_below: depth,
            });
        }
        if code.trim_end().ends_with('{') {
            // A guard as a parameter shows that its lock is held.
            if signature.contains("fn ") && signature.contains("&KeyGuard<") {
                guards.push(Guard {
                    name: String::new(),
                    ends_below: depth,
                });
            }
            signature.clear();
        }
        guards.retain(|guard| {
            guard.name.is_empty() || !code.contains(&format!("drop({})", guard.name))
        });
    }
    found
}

#[test]
fn no_log_call_with_guard_in_scope() {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    let mut wrong = Vec::new();
    for path in files
        .iter()
        .filter(|path| !is_test(path) && !path.starts_with(root().join("src/locks")))
    {
        let text = std::fs::read_to_string(path).unwrap();
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
        let shown = path.strip_prefix(root()).unwrap().display();
        wrong.extend(
            offences(code)
                .into_iter()
                .map(|line| format!("{shown}:{line}")),
        );
    }
    assert!(
        wrong.is_empty(),
        "log calls under a lock, which may block on the reader of the log:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn scan_finds_guards_sections_and_evidence() {
    #[track_caller]
    fn check(body: &str, expected: &[usize]) {
        assert_eq!(offences(body), expected, "{body}");
    }
    check(
        "fn f() {\nlet guard = self.locks.vm.lock(&id);\nlog::warn!();\n}\n",
        &[3],
    );
    check(
        "fn f() {\nlet mut guard = self.locks.vm.lock(id);\nlog::warn!();\n}\n",
        &[3],
    );
    check(
        "fn f() {\nlet guard = self.locks.vm.lock(&id);\ndrop(guard);\nlog::warn!();\n}\n",
        &[],
    );
    check(
        "fn f() {\n{\nlet mut state = self.state.lock();\n}\nlog::warn!();\n}\n",
        &[],
    );
    check(
        "fn f() {\nlet n = self.state.lock().len();\nlog::warn!();\n}\n",
        &[],
    );
    check(
        "fn f() {\nself.change(true, |tx| {\nlog::warn!();\n})?;\nlog::warn!();\n}\n",
        &[3],
    );
    check(
        "fn f() {\nmatch &mut *self.state.lock() {\nA => log::warn!(),\n}\nlog::warn!();\n}\n",
        &[3],
    );
    check(
        "fn f(\nvm: &KeyGuard<'_, VmId>,\n) {\nlog::warn!();\n}\nfn g() {\nlog::warn!();\n}\n",
        &[4],
    );
}

/// The modules of the daemon, whose threads hold its locks.
const MODULES: [&str; 12] = [
    "daemon", "disk", "guest", "host", "image", "net", "ops", "pool", "server", "session", "store",
    "vmm",
];
/// Calls that touch a file or a socket, sleep, or wait for a thread.
const BLOCKING: [&str; 21] = [
    ".exists()",
    ".try_exists()",
    ".symlink_metadata()",
    ".set_len(",
    "std::fs::",
    "File::open(",
    "File::create(",
    "File::create_new(",
    "rustix::fs::open",
    "rustix::fs::unlink",
    "rustix::fs::mkdir",
    "rustix::fs::rename",
    "rustix::fs::stat",
    ".sync_all()",
    ".sync_data()",
    "thread::sleep(",
    "park_timeout(",
    ".join();",
    "Stream::connect(",
    "Listener::bind(",
    "Socket::bind(",
];
/// The names in `std::fs` that are not functions.
const NOT_CALLS: [&str; 8] = [
    "std::fs::File",
    "std::fs::Metadata",
    "std::fs::Permissions",
    "std::fs::OpenOptions",
    "std::fs::DirBuilder",
    "std::fs::ReadDir",
    "std::fs::DirEntry",
    "std::fs::FileT",
];
/// Calls that tell the lock checker about a blocking call.
const ANNOUNCES: [&str; 3] = ["may_block(", "region(", "durable_wait("];
/// Programs that run in a guest or build one. They contain no lock of the daemon.
const OTHER_PROGRAMS: [&str; 1] = ["src/image/guest/"];

/// A function's name, and where its body begins and ends.
struct Function {
    name: String,
    begin: usize,
    end: usize,
}

/// Replaces comments and texts with spaces, so that braces and names in them do not count.
fn blanked(text: &str) -> Vec<u8> {
    let mut code = text.as_bytes().to_vec();
    let mut i = 0;
    while i < code.len() {
        let rest = &text.as_bytes()[i..];
        let length = if rest.starts_with(b"//") {
            rest.iter().position(|c| *c == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"r#\"") {
            rest.windows(2)
                .position(|w| w == b"\"#")
                .map_or(rest.len(), |end| end + 2)
        } else if rest[0] == b'"' {
            let mut end = 1;
            while end < rest.len() && rest[end] != b'"' {
                end += if rest[end] == b'\\' { 2 } else { 1 };
            }
            end + 1
        } else if rest.len() > 3 && rest[0] == b'\'' && (rest[1] == b'\\' || rest[2] == b'\'') {
            let from = if rest[1] == b'\\' { 3 } else { 2 };
            rest[from..]
                .iter()
                .position(|c| *c == b'\'')
                .map_or(1, |end| from + end + 1)
        } else {
            i += 1;
            continue;
        };
        let end = (i + length).min(code.len());
        code[i..end]
            .iter_mut()
            .filter(|c| **c != b'\n')
            .for_each(|c| *c = b' ');
        i = end;
    }
    code
}

fn functions(code: &[u8]) -> Vec<Function> {
    let text = String::from_utf8_lossy(code);
    let mut found = Vec::new();
    for (at, _) in text.match_indices("fn ") {
        if at > 0 && (code[at - 1].is_ascii_alphanumeric() || code[at - 1] == b'_') {
            continue;
        }
        let name = text[at + 3..].split(|c: char| !c.is_alphanumeric() && c != '_');
        let mut depth = 0;
        let body = code[at..].iter().position(|c| {
            depth += match c {
                b'(' | b'[' => 1,
                b')' | b']' => -1,
                _ => 0,
            };
            depth <= 0 && matches!(c, b'{' | b';')
        });
        let Some(begin) = body.map(|offset| at + offset).filter(|i| code[*i] == b'{') else {
            continue;
        };
        let mut depth = 0;
        let length = code[begin..].iter().position(|c| {
            depth += match c {
                b'{' => 1,
                b'}' => -1,
                _ => 0,
            };
            depth == 0
        });
        found.push(Function {
            name: name.into_iter().next().unwrap_or_default().to_owned(),
            begin,
            end: length.map_or(code.len(), |length| begin + length),
        });
    }
    found
}

/// Returns the names of the functions that block without telling the lock checker. A function
/// inside another one may rely on the outer one.
fn unannounced(text: &str) -> Vec<String> {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let code = blanked(text);
    let functions = functions(&code);
    let code = String::from_utf8_lossy(&code);
    let mut names = Vec::new();
    for call in BLOCKING {
        for (at, _) in code.match_indices(call) {
            if NOT_CALLS.iter().any(|other| code[at..].starts_with(other)) {
                continue;
            }
            let around = functions.iter().filter(|f| f.begin <= at && at < f.end);
            let Some(inner) = around.clone().next_back() else {
                continue;
            };
            let is_announced = |f: &Function| {
                let body = &code[f.begin..f.end];
                ANNOUNCES.iter().any(|call| body.contains(call))
            };
            if !around.clone().any(is_announced) && !names.contains(&inner.name) {
                names.push(inner.name.clone());
            }
        }
    }
    names
}

#[test]
fn every_blocking_function_says_so() {
    let mut wrong = Vec::new();
    for module in MODULES {
        let mut files = Vec::new();
        rust_files(&root().join("src").join(module), &mut files);
        for path in files.iter().filter(|path| !is_test(path)) {
            let shown = path.strip_prefix(root()).unwrap().display().to_string();
            let is_fake = ["fake", "test", "bench", "fuzz"]
                .iter()
                .any(|word| shown.contains(word));
            if is_fake || OTHER_PROGRAMS.iter().any(|dir| shown.starts_with(dir)) {
                continue;
            }
            let names = unannounced(&std::fs::read_to_string(path).unwrap());
            wrong.extend(names.into_iter().map(|name| format!("{shown}: {name}")));
        }
    }
    assert!(
        wrong.is_empty(),
        "functions that block without `locks::may_block`:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn scan_finds_functions_that_block_silently() {
    #[track_caller]
    fn check(text: &str, expected: &[&str]) {
        assert_eq!(unannounced(text), expected, "{text}");
    }
    check("fn f() { std::fs::read(p) }", &["f"]);
    check(
        "fn f() { may_block(\"file access\"); std::fs::read(p) }",
        &[],
    );
    check(
        "fn f(file: &std::fs::File) { \"std::fs::read\"; // std::fs::read\n}",
        &[],
    );
    check(
        "fn f() {}\nfn g(a: [u8; 2]) -> u8 { thread::sleep(d) }",
        &["g"],
    );
    check(
        "fn f() { region(Rank::HostCmd); g(|| std::fs::read(p)) }",
        &[],
    );
    check("fn f() { '{'; }\nfn g() { worker.join(); }", &["g"]);
    check(
        "#[cfg(test)]\nmod tests { fn f() { std::fs::read(p) } }",
        &[],
    );
}
