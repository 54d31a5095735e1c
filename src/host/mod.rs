//! The host, at arm's length: the only process spawn, threads, files, pidfds, limits.

pub mod command;
pub mod confine;
pub mod fs;
pub mod inherited;
pub mod interactive;
pub mod limits;
pub mod log;
pub mod memory;
pub mod mount;
pub mod piped;
pub mod process;
pub mod program;
pub mod reach;
pub mod shell;
pub mod thread;
pub mod usage;
pub mod wait;

pub use command::{Command, Commands, HostCommands, Output};
