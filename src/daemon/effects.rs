//! Points at which the daemon changes something on the host. Tests can make the n-th point fail, or
//! kill the daemon there. Outside tests, passing a point does nothing.

use crate::error::Result;

#[cfg(any(test, feature = "fakes"))]
pub trait Plan: Send + Sync {
    /// The daemon calls this before an effect. If it returns an error, the effect does not happen.
    fn before(&self, what: &str) -> Result<()>;
}

#[derive(Default)]
pub struct Effects {
    #[cfg(any(test, feature = "fakes"))]
    plan: crate::sched::OnceLock<std::sync::Arc<dyn Plan>>,
}

impl Effects {
    #[cfg(any(test, feature = "fakes"))]
    pub fn follow(&self, plan: std::sync::Arc<dyn Plan>) {
        if self.plan.set(plan).is_err() {
            log::error!("an effect plan is already set");
        }
    }

    #[cfg(any(test, feature = "fakes"))]
    pub(super) fn before(&self, what: &str) -> Result<()> {
        self.plan.get().map_or(Ok(()), |plan| plan.before(what))
    }

    #[cfg(not(any(test, feature = "fakes")))]
    #[inline(always)]
    // The signature must match the one above.
    #[allow(clippy::unnecessary_wraps, clippy::unused_self)]
    pub(super) fn before(&self, _what: &str) -> Result<()> {
        Ok(())
    }
}

/// Kills the daemon at the n-th effect or commit, for tests with real guests. A file that the test
/// writes contains n. If it contains `stop WHAT` instead, the daemon is stopped before that effect,
/// until the test continues it.
#[cfg(feature = "fakes")]
pub struct DieAt {
    file: std::path::PathBuf,
    /// The number of points left before the kill, or 0 if it must be read from the file.
    left: std::sync::atomic::AtomicU64,
}

#[cfg(feature = "fakes")]
impl DieAt {
    /// The environment variable that contains the path of the file.
    pub const VARIABLE: &str = "FCD_TEST_DIE_AT";

    pub fn from_env() -> Option<std::sync::Arc<Self>> {
        let file = std::env::var_os(Self::VARIABLE)?.into();
        Some(std::sync::Arc::new(Self {
            file,
            left: 0.into(),
        }))
    }

    fn pass(&self, what: &str) {
        crate::locks::may_block("file access");
        use std::sync::atomic::Ordering::SeqCst;
        let Ok(text) = std::fs::read_to_string(&self.file) else {
            return self.left.store(0, SeqCst);
        };
        if let Some(effect) = text.strip_prefix("stop ") {
            if what == effect && std::fs::remove_file(&self.file).is_ok() {
                send_self(rustix::process::Signal::STOP);
            }
            return;
        }
        let left = match self.left.load(SeqCst) {
            0 => text.trim().parse().unwrap_or(0),
            left => left,
        };
        self.left.store(left.saturating_sub(1), SeqCst);
        if left == 1 {
            log::warn!("dies here: {what}");
            send_self(rustix::process::Signal::KILL);
            loop {
                std::thread::park();
            }
        }
    }
}

#[cfg(feature = "fakes")]
fn send_self(signal: rustix::process::Signal) {
    let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
}

#[cfg(feature = "fakes")]
impl Plan for DieAt {
    fn before(&self, what: &str) -> Result<()> {
        self.pass(what);
        Ok(())
    }
}

#[cfg(feature = "fakes")]
impl crate::store::faults::CommitHook for DieAt {
    fn before_commit(&self) -> Option<crate::store::faults::Fault> {
        self.pass("commit");
        None
    }
}
