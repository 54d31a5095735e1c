//! Checks a file system that was not made by fcd. Its bytes are hostile, so the program that parses
//! them runs without privileges.

use crate::error::{Kind, Result};
use crate::host::{Command, Commands, Credentials};
use crate::locks::Cancel;
use std::path::Path;
use std::time::Duration;

const CHECK_DEADLINE: Duration = Duration::from_secs(600);

/// Checks a file system with e2fsck, which runs as the helper's user.
pub(super) fn check(
    commands: &dyn Commands,
    rootfs: &Path,
    helper: Option<Credentials>,
    cancel: &Cancel,
) -> Result<()> {
    let command = match helper {
        Some(Credentials { uid, gid }) => Command::new("setpriv").args([
            format!("--reuid={uid}"),
            format!("--regid={gid}"),
            "--clear-groups".to_owned(),
            "--no-new-privs".to_owned(),
            "e2fsck".to_owned(),
        ]),
        None => Command::new("e2fsck"),
    };
    let command = command
        .args(["-f", "-n"])
        .arg(rootfs)
        .deadline(CHECK_DEADLINE);
    commands
        .run(&command, cancel, &mut |_| {})
        .map(drop)
        .map_err(|e| match e.kind() {
            Kind::CommandMissing => e.hint("sudo apt-get install e2fsprogs util-linux"),
            _ => e.context("check the image's file system"),
        })
}
