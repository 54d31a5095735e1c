//! Access to the host: processes, threads, files, descriptors, limits and the log.
//!
//! This is the only place that starts threads ([`thread`]) and processes: short commands
//! ([`command`], [`piped`], [`interactive`]) and long-lived ones such as VMMs ([`process`]).
//! Functions that may block check that the thread holds no lock that forbids it.

pub mod command;
pub mod confine;
mod credentials;
pub mod fs;
pub mod hex;
pub mod inherited;
pub mod interactive;
pub mod limits;
pub mod log;
pub mod memory;
pub mod mount;
pub mod pidfd_info;
pub mod piped;
pub mod plural;
pub mod process;
pub mod program;
pub mod random;
pub mod reach;
pub mod shell;
pub mod strerror;
pub mod text;
pub mod thread;
pub mod time;
pub mod usage;
pub mod wait;

#[cfg(any(test, feature = "fakes"))]
pub use command::Output;
pub use command::{Command, Commands, Complaint, HostCommands};
pub use credentials::Credentials;
