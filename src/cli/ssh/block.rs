//! Renders the `Host` block of ssh_config(5) for one VM, in which the VM's keys are the only ones.

use super::keys::KeyFiles;
use crate::api::vm::SshConfigReply;
use crate::client::Result;
use crate::error::{Error, Kind};
use crate::host::text::quoted;
use std::fmt::Write as _;
use std::path::Path;

/// Renders the options that `fcctl ssh` and `fcctl ssh-config` have in common.
pub(super) fn render(
    config: &SshConfigReply,
    files: &KeyFiles,
    user: Option<&str>,
) -> Result<String> {
    let (key, known_hosts) = (path_word(&files.key())?, path_word(&files.known_hosts())?);
    let mut text = format!(
        "Host {name}\n  HostName {ip}\n  Port {port}\n  User {login}\n  HostKeyAlias {name}\n  \
         IdentityFile {key}\n  IdentitiesOnly yes\n  ForwardAgent no\n  \
         UserKnownHostsFile {known_hosts}\n  GlobalKnownHostsFile /dev/null\n  \
         StrictHostKeyChecking yes\n  UpdateHostKeys no\n  PasswordAuthentication no\n  \
         KbdInteractiveAuthentication no\n",
        name = config.name,
        ip = config.addr.ip(),
        port = config.addr.port(),
        login = config.user,
    );
    if let Some(user) = user {
        // The login shell of a guest runtime reads this variable. In other guests, `User` is
        // already this user.
        let _ = writeln!(text, "  SetEnv FCD_USER={user}");
    }
    Ok(text)
}

/// Quotes a path as the value of an option. ssh expands `%`, and cannot read every path back.
fn path_word(path: &Path) -> Result<String> {
    let is_readable = |text: &&str| {
        !text.contains(|c: char| c.is_control() || c == '"' || c == '\\') && !text.contains("${")
    };
    match path.to_str().filter(is_readable) {
        Some(text) => Ok(format!("\"{}\"", text.replace('%', "%%"))),
        None => Err(Error::new(
            Kind::Unsupported,
            format!(
                "ssh's configuration cannot contain the path {}",
                quoted(&path.to_string_lossy())
            ),
        )
        .hint("set XDG_STATE_HOME and TMPDIR to directories without quotes in their names")
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_ssh_cannot_read_are_refused() {
        assert_eq!(path_word(Path::new("/a b/5%")).unwrap(), "\"/a b/5%%\"");
        for bad in ["/a\"b", "/a\\b", "/a\nProxyCommand evil", "/${HOME}"] {
            let failure = path_word(Path::new(bad)).unwrap_err();
            assert!(failure.is(Kind::Unsupported), "{bad:?}: {failure:?}");
        }
    }
}
