//! Explains why a user of the guest cannot log in. ssh itself says only that permission is denied.

use super::block;
use super::keys::{KeyFiles, write_private};
use crate::api::vm::{SshConfigRequest, VmSshConfig};
use crate::client::{Client, Result};
use crate::error::{Error, Kind};
use crate::host::command::{Command, run_any_status};
use crate::host::shell::quote;
use crate::locks::Cancel;
use std::time::Duration;

/// The exit status of the script if the guest does not have the user.
const NO_USER_STATUS: i32 = 77;
const DEADLINE: Duration = Duration::from_secs(60);

/// Fails if the guest has no user of this name. Succeeds if root cannot log in to check.
pub(super) fn require(client: &mut Client, vm: &str, user: &str, cancel: &Cancel) -> Result<()> {
    let config = client.call::<VmSshConfig>(&SshConfigRequest {
        vm: vm.to_owned(),
        user: None,
    })?;
    let dir = tempfile::Builder::new()
        .prefix("fcctl-user-")
        .tempdir()
        .map_err(|e| Error::io("create a directory for ssh", e))?;
    let files = KeyFiles::in_dir(dir.path());
    files.write(&config)?;
    let mut text = block::render(&config, &files, Some("0"))?;
    text.push_str("  IdentityAgent none\n  ControlPath none\n  LogLevel ERROR\n");
    let file = dir.path().join("config");
    write_private(&file, &text)?;
    let script = format!(
        "while IFS=: read -r n x; do [ \"$n\" != {} ] || exit 0; done </etc/passwd; exit {NO_USER_STATUS}",
        quote(user)
    );
    let command = Command::new("ssh")
        .args(["-T".into(), "-F".into(), file.into_os_string()])
        .args([config.name.to_string(), script])
        .deadline(DEADLINE);
    let looked = run_any_status(&command, cancel, &mut |_| {});
    if looked.is_ok_and(|looked| looked.status == NO_USER_STATUS) {
        let text = format!("VM {vm}: the guest has no user {user}");
        let hint = format!("list its users: fcctl exec {vm} -- cut -d: -f1 /etc/passwd");
        return Err(Error::new(Kind::InvalidArgument, text).hint(hint).into());
    }
    Ok(())
}
