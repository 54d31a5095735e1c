//! Fakes for the host commands of a daemon under test.

use super::{REAL_DISKS, await_that};
use fcd::testing::error::{Error, Kind};
use fcd::testing::host::command::Output;
use fcd::testing::host::{Command, Commands};
use fcd::testing::locks::Cancel;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// State of the fake image builds.
#[derive(Default)]
pub struct Builds {
    /// While this is true, a build's command keeps running.
    pub are_held: AtomicBool,
    pub running: AtomicUsize,
    /// The highest number of builds that ran at once.
    pub peak: AtomicUsize,
    /// While this is true, a check of a file system keeps running.
    pub checks_are_held: AtomicBool,
    pub checks_running: AtomicUsize,
}

impl Builds {
    fn run(&self, cancel: &Cancel) -> fcd::testing::error::Result<Output> {
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(running, Ordering::SeqCst);
        await_that("the build may end", || {
            !self.are_held.load(Ordering::SeqCst) || cancel.is_cancelled()
        });
        self.running.fetch_sub(1, Ordering::SeqCst);
        match cancel.cause() {
            Some(cause) => Err(Error::new(
                Kind::Cancelled,
                format!("build: cancelled: {cause}"),
            )),
            None => Err(Error::new(
                Kind::CommandFailed,
                "there is no archive in a test",
            )),
        }
    }
}

impl Builds {
    /// Blocks while checks are held. Then reports the file system as clean.
    fn check(&self, cancel: &Cancel) -> fcd::testing::error::Result<Output> {
        self.checks_running.fetch_add(1, Ordering::SeqCst);
        await_that("the check may end", || {
            !self.checks_are_held.load(Ordering::SeqCst) || cancel.is_cancelled()
        });
        self.checks_running.fetch_sub(1, Ordering::SeqCst);
        match cancel.cause() {
            Some(cause) => Err(Error::new(
                Kind::Cancelled,
                format!("check: cancelled: {cause}"),
            )),
            None => Ok(Output::default()),
        }
    }
}

/// Fake host commands: a `qemu-img` that writes only a header, the real `dmsetup` on a test host,
/// and image builds that fail at the end.
pub struct FakeCommands(pub Arc<Builds>);

impl Commands for FakeCommands {
    fn run(
        &self,
        command: &Command,
        cancel: &Cancel,
        on_line: &mut dyn FnMut(&str),
    ) -> fcd::testing::error::Result<Output> {
        if command.program == "dmsetup" && std::env::var_os(REAL_DISKS).is_some() {
            return fcd::testing::host::HostCommands.run(command, cancel, on_line);
        }
        // The fake blocks like the real command and passes on output while it runs.
        let _blocking = fcd::testing::locks::region(fcd::testing::locks::Rank::HostCmd);
        on_line("a line of the command's");
        let args: Vec<_> = command
            .args
            .iter()
            .map(|a| a.to_string_lossy().into_owned())
            .collect();
        if command.program == "mkfs.ext4" {
            return Ok(Output::default());
        }
        if command.program == "e2fsck" || args.iter().any(|a| a == "e2fsck") {
            return self.0.check(cancel);
        }
        if command.program == "apt-config"
            || (command.program == "setpriv" && args.iter().any(|a| a == "fcd-probe"))
        {
            return Ok(Output::default());
        }
        if command.program == "setpriv" {
            // The build reports this line of mmdebstrap as progress.
            on_line("I: running apt-get update");
            return self.0.run(cancel);
        }
        if command.program != "qemu-img" {
            return Err(Error::new(
                Kind::CommandMissing,
                format!("run {}: it is not there", command.program.to_string_lossy()),
            ));
        }
        if args.iter().any(|a| a == "rebase") {
            return Ok(Output::default());
        }
        let [.., path, size] = args.as_slice() else {
            panic!("{args:?}")
        };
        let mut header = [0u8; 32];
        header[..4].copy_from_slice(b"QFI\xfb");
        // Version 3, clusters of 64 KiB, and no table: the guest has not written anything.
        (header[7], header[23]) = (3, 16);
        header[24..].copy_from_slice(&size.parse::<u64>().unwrap().to_be_bytes());
        std::fs::write(path, header).map_err(|e| Error::io("write a disk", e))?;
        Ok(Output::default())
    }
}
