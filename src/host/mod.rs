//! The host, at arm's length: the only process spawn, threads, files, pidfds.

pub mod command;
pub mod interactive;
pub mod piped;
pub mod shell;
pub mod thread;

pub use command::{Command, Commands, HostCommands, Output};
