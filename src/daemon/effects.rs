//! The points at which the daemon changes something of the host's. Tests make the n-th fail, or end
//! everything there as `kill -9` would; a daemon that is not tested passes them.

use crate::error::Result;

#[cfg(any(test, feature = "fakes"))]
pub trait Plan: Send + Sync {
    /// Before the effect. An error: the effect does not happen.
    fn before(&self, what: &str) -> Result<()>;
}

#[derive(Default)]
pub struct Effects {
    #[cfg(any(test, feature = "fakes"))]
    plan: std::sync::OnceLock<std::sync::Arc<dyn Plan>>,
}

impl Effects {
    #[cfg(any(test, feature = "fakes"))]
    pub fn follow(&self, plan: std::sync::Arc<dyn Plan>) {
        if self.plan.set(plan).is_err() {
            log::error!("a plan of effects is followed already");
        }
    }

    #[cfg(any(test, feature = "fakes"))]
    pub(super) fn before(&self, what: &str) -> Result<()> {
        self.plan.get().map_or(Ok(()), |plan| plan.before(what))
    }

    #[cfg(not(any(test, feature = "fakes")))]
    #[inline(always)]
    #[allow(clippy::unnecessary_wraps, clippy::unused_self)] // As the other.
    pub(super) fn before(&self, _what: &str) -> Result<()> {
        Ok(())
    }
}

/// For tests with real guests: `kill -9` at the n-th effect or commit after a file has said n, as
/// long as it says so.
#[cfg(feature = "fakes")]
pub struct DieAt {
    file: std::path::PathBuf,
    /// Points until then; 0: nobody has said.
    left: std::sync::atomic::AtomicU64,
}

#[cfg(feature = "fakes")]
impl DieAt {
    /// The file's name is the value of this variable of the environment.
    pub const VARIABLE: &str = "FCD_TEST_DIE_AT";

    pub fn told() -> Option<std::sync::Arc<Self>> {
        let file = std::env::var_os(Self::VARIABLE)?.into();
        Some(std::sync::Arc::new(Self { file, left: 0.into() }))
    }

    fn pass(&self, what: &str) {
        use std::sync::atomic::Ordering::SeqCst;
        let Ok(said) = std::fs::read_to_string(&self.file) else { return self.left.store(0, SeqCst) };
        let left = match self.left.load(SeqCst) {
            0 => said.trim().parse().unwrap_or(0),
            left => left,
        };
        self.left.store(left.saturating_sub(1), SeqCst);
        if left == 1 {
            log::warn!("dies here: {what}");
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            loop {
                std::thread::park();
            }
        }
    }
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
