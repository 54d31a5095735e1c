//! The host, at arm's length: the only process spawn, threads, files, pidfds.

pub mod command;
pub mod interactive;
pub mod thread;

pub use command::{Command, Commands, HostCommands, Output};
