//! Checks that the daemon's code reaches the scheduler and the clocks only through `src/sched`.
//! Anything else would escape a simulation: a thread that it does not know, a wait that it cannot
//! end, or an order that its seed does not decide.

use crate::layers::{is_test, root, rust_files};

/// The modules that a simulation runs, and the seam itself.
const MODULES: [&str; 9] = [
    "daemon", "guest", "host", "locks", "ops", "pool", "server", "session", "store",
];
/// Other files that a simulation runs.
const FILES: [&str; 6] = [
    "uids.rs",
    "vmm/fake",
    "vmm/console.rs",
    "vmm/poll_thread.rs",
    "disk/seed.rs",
    "disk/mod.rs",
];
/// Items of std and other crates that `src/sched` replaces.
const FORBIDDEN: [&str; 26] = [
    "std::thread::Builder",
    "std::thread::JoinHandle",
    "std::thread::Thread",
    "std::thread::current",
    "std::thread::park",
    "std::thread::sleep",
    "std::thread::spawn",
    "std::thread::yield_now",
    "thread::sleep(",
    "std::time::Instant",
    "SystemTime::now",
    "std::sync::Barrier",
    "std::sync::OnceLock",
    "std::sync::mpsc",
    "crossbeam_channel",
    "std::collections::HashMap",
    "std::collections::HashSet",
    "collections::{HashMap",
    // Only maps with the keys of std have it. Write `HashMap::default()`.
    "HashMap::new()",
    "HashSet::new()",
    "collections::{HashSet",
    "OsRng",
    "TimerFd",
    "nix::poll::poll",
    "PollTimeout",
    "rustix::event",
];
/// Files in which one of them is right.
const ALLOWED: [(&str, &str); 14] = [
    // The log's thread runs outside of every simulation.
    ("host/log.rs", "std::time::Instant"),
    ("host/log.rs", "std::thread::current"),
    ("host/log.rs", "crossbeam_channel"),
    ("host/log.rs", "std::sync::OnceLock"),
    // These say the same in every run of a process.
    ("host/process/identity.rs", "std::sync::OnceLock"),
    ("host/confine/mod.rs", "std::sync::OnceLock"),
    ("store/vfs.rs", "std::sync::OnceLock"),
    ("locks/check_on.rs", "std::sync::OnceLock"),
    // These are only used before a daemon runs.
    ("server/claim.rs", "thread::sleep"),
    ("server/run.rs", "thread::sleep"),
    // A thread that borrows from its scope. No part of a simulation starts one.
    ("host/thread.rs", "std::thread::Builder"),
    // The process has been killed.
    ("daemon/effects.rs", "std::thread::park"),
    // The receivers are those of tests.
    ("vmm/fake/mod.rs", "std::sync::mpsc"),
    ("vmm/fake/controls.rs", "std::sync::mpsc"),
];

/// Returns the forbidden texts in the code, which may have been imported in groups.
fn offences(text: &str) -> Vec<&'static str> {
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let code: Vec<&str> = code
        .lines()
        .map(|line| line.split("//").next().unwrap_or(""))
        .collect();
    let code = code
        .join("\n")
        .replace("sync::{Arc, OnceLock", "sync::OnceLock");
    let found = FORBIDDEN.into_iter().filter(|call| code.contains(call));
    found.collect()
}

#[test]
fn daemon_uses_only_the_seam() {
    let mut files = Vec::new();
    let places = MODULES.iter().chain(&FILES);
    for place in places.map(|place| root().join("src").join(place)) {
        match place.is_dir() {
            true => rust_files(&place, &mut files),
            false => files.push(place),
        }
    }
    let mut wrong = Vec::new();
    for path in files.iter().filter(|path| !is_test(path)) {
        let shown = path.strip_prefix(root().join("src")).unwrap();
        let shown = shown.display().to_string();
        for found in offences(&std::fs::read_to_string(path).unwrap()) {
            let is_allowed = |(file, call): &(&str, &str)| *file == shown && found.contains(call);
            if !ALLOWED.iter().any(is_allowed) && !shown.contains("test") {
                wrong.push(format!("src/{shown}: {found}"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "use what src/sched offers instead:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn scan_finds_what_bypasses_the_seam() {
    assert_eq!(
        offences("let a = std::thread::park();"),
        ["std::thread::park"]
    );
    assert_eq!(offences("use std::sync::{Arc, OnceLock};").len(), 1);
    assert_eq!(offences("// std::thread::park"), [""; 0]);
    assert_eq!(offences("#[cfg(test)]\nmod tests { OsRng }"), [""; 0]);
}
