//! Speaks SSH with libssh2. Each command has one session, one connection and one thread, and the
//! thread waits for everything in a single poll.
//!
//! **This code parses what a guest sends, so it must run only in a helper process**
//! ([`super::helper`]). The test `layers` checks that nothing else names it.

mod channel;
mod flow;
mod login;
mod pump;
mod signal;
mod wire;

#[cfg(any(test, feature = "fakes"))]
pub mod in_process;

pub(super) use login::{Identity, LogInError, log_in, start};
pub(super) use pump::Pump;
