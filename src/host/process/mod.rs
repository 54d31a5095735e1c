//! Long-lived processes such as VMMs. They outlive the daemon and are identified by more than their
//! pid ([`Identity`]). They are signalled and awaited through a pidfd only ([`Process`]).

mod activity;
mod find;
mod handle;
mod identity;
mod spawn;
#[cfg(test)]
mod tests;

pub use activity::thread_activity;
pub use find::{arguments, executable, find_by_argument, find_by_prefix, uid};
pub use handle::{Exit, Process, exit_of_gone, is_alive};
pub use identity::{Identity, boot_id};
pub use spawn::{Spawn, spawn, spawn_in_own_pids};
