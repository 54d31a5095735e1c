//! The points at which the daemon changes something of the host's. Tests make the n-th fail, or end everything there
//! as `kill -9` would; a daemon that is not tested passes them.

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
