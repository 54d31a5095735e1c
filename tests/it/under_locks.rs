//! Checks that code under a lock only accesses memory. The lock checker sees only the code that
//! runs. This test reads the source, because most log calls are on paths that no test takes.

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
