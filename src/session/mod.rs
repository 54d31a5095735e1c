//! Keeps the exec sessions, and decides which caller may control which running command.
//!
//! [`Registry`] maps session ids to handles. The registry's only lock has `Rank::Sessions`. No
//! handle is used or dropped while this lock is held.

use crate::error::{Error, Kind, Result};
use crate::ids::SessionId;
use crate::locks::{Mutex, Rank};
use crate::sched::HashMap;
use std::sync::Arc;

/// The sessions of one daemon. `H` is the handle that controls a running command.
pub(crate) struct Registry<H> {
    sessions: Arc<Mutex<HashMap<SessionId, Entry<H>>>>,
}

struct Entry<H> {
    owner_uid: u32,
    handle: H,
}

/// A registered session. Dropping it removes its entry.
pub(crate) struct Session<H> {
    pub id: SessionId,
    sessions: Arc<Mutex<HashMap<SessionId, Entry<H>>>>,
}

impl<H: Clone> Default for Registry<H> {
    fn default() -> Self {
        Self::new()
    }
}

impl<H: Clone> Registry<H> {
    pub(crate) fn new() -> Self {
        Self {
            sessions: Arc::new(Mutex::new(Rank::Sessions, HashMap::default())),
        }
    }

    /// Registers a session. The caller must keep the result for as long as the command runs.
    pub(crate) fn begin(&self, owner_uid: u32, handle: H) -> Session<H> {
        let id = SessionId::random();
        self.sessions
            .lock()
            .insert(id.clone(), Entry { owner_uid, handle });
        Session {
            id,
            sessions: self.sessions.clone(),
        }
    }

    /// Returns a session's handle to its owner and to root. Any other caller gets
    /// `session_not_found`. The handle is a clone, so it is used without this registry's lock.
    pub(crate) fn find(&self, id: &SessionId, caller_uid: u32) -> Result<H> {
        let sessions = self.sessions.lock();
        match sessions
            .get(id)
            .filter(|e| caller_uid == 0 || caller_uid == e.owner_uid)
        {
            Some(entry) => Ok(entry.handle.clone()),
            None => Err(Error::new(
                Kind::SessionNotFound,
                format!("session {id} does not exist or its command has ended"),
            )),
        }
    }

    #[cfg(any(test, feature = "fakes"))]
    pub(crate) fn len(&self) -> usize {
        self.sessions.lock().len()
    }
}

impl<H> Drop for Session<H> {
    fn drop(&mut self) {
        // Drop the handle after the lock is released.
        let entry = self.sessions.lock().remove(&self.id);
        drop(entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_succeeds_only_for_owner_and_root_while_the_session_lasts() {
        let registry = Registry::new();
        let session = registry.begin(1000, "handle");
        let id = session.id.clone();
        assert_eq!(registry.find(&id, 1000).unwrap(), "handle");
        assert_eq!(registry.find(&id, 0).unwrap(), "handle");
        assert_eq!(
            registry.find(&id, 1001).unwrap_err().kind(),
            Kind::SessionNotFound
        );
        assert_eq!(
            registry.find(&SessionId::random(), 0).unwrap_err().kind(),
            Kind::SessionNotFound
        );
        drop(session);
        assert_eq!(
            registry.find(&id, 1000).unwrap_err().kind(),
            Kind::SessionNotFound
        );
        assert!(registry.len() == 0);
    }

    #[test]
    fn session_of_a_panicking_command_is_removed() {
        let registry = Registry::new();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _session = registry.begin(0, ());
            panic!("in the command");
        }));
        assert!(result.is_err() && registry.len() == 0);
    }
}
