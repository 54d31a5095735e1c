//! SSH with libssh2: one session, connection and thread per command. Every wait is part of one
//! poll.
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
