//! SSH by libssh2: one session, one connection and one thread per command, every wait in one poll.
//!
//! **This parses what a guest sends, so it runs in a helper process only** ([`super::helper`]); the test `layers` sees that
//! nothing else names it.

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
