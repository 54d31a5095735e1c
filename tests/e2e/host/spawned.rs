//! A program that runs while a test continues.

use super::{signal, wait_for};
use std::fs;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// A process whose output goes to files. The test can read the output while the process runs, and
/// the process never blocks on it.
pub struct Spawned {
    pub child: Child,
    out: tempfile::NamedTempFile,
    err: tempfile::NamedTempFile,
}

impl Spawned {
    pub fn start(command: &mut Command) -> Self {
        let (out, err) = (
            tempfile::NamedTempFile::new().unwrap(),
            tempfile::NamedTempFile::new().unwrap(),
        );
        let child = command
            .stdout(out.reopen().unwrap())
            .stderr(err.reopen().unwrap())
            .spawn()
            .unwrap();
        Self { child, out, err }
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.out.path()).unwrap()).into_owned()
    }
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.err.path()).unwrap()).into_owned()
    }
    pub fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// Waits until the process's stdout contains `text`. Fails the test if the process ends first.
    #[track_caller]
    pub fn says(&mut self, text: &str) {
        wait_for(&format!("{text:?} on stdout"), || {
            if self.stdout().contains(text) {
                return Some(());
            }
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none() || self.stdout().contains(text),
                "{ended:?}: {}{}",
                self.stdout(),
                self.stderr()
            );
            None
        });
    }

    /// Waits for the process to end. Returns its exit status and the duration of the wait.
    pub fn end(&mut self) -> (Option<i32>, Duration) {
        let begun = Instant::now();
        let status = wait_for("the end of a process", || self.child.try_wait().unwrap());
        (status.code(), begun.elapsed())
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
