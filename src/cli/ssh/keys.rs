//! The files with the keys of one VM, which ssh reads.

use crate::api::vm::SshConfigReply;
use crate::cli::context::Env;
use crate::cli::key_dir;
use crate::client::Result;
use crate::error::{Error, Kind};
use crate::host::fs::create_private_dir;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The key with which a client logs in to a VM, and the host key that it expects.
pub(super) struct KeyFiles {
    dir: PathBuf,
}

/// The result of [`KeyFiles::write`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    Unchanged,
    Changed,
}

impl KeyFiles {
    pub(super) fn in_dir(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// Returns the key files of a VM that outlive this process. They belong to this user. The VMs
    /// of each daemon have a separate directory, because two daemons may have VMs of the same name.
    pub(super) fn lasting(env: &Env, socket: &Path, config: &SshConfigReply) -> Result<Self> {
        let Some(dir) = key_dir::of_daemon(env, socket) else {
            return Err(Error::new(
                Kind::InvalidArgument,
                "find a directory for the keys: HOME is not set",
            )
            .hint("set HOME or XDG_STATE_HOME")
            .into());
        };
        Ok(Self {
            dir: dir.join(config.name.as_str()),
        })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn key(&self) -> PathBuf {
        self.dir.join("key")
    }

    pub(super) fn known_hosts(&self) -> PathBuf {
        self.dir.join("known_hosts")
    }

    /// Writes the keys, unless the files already contain them. Only this user can read the files.
    pub(super) fn write(&self, config: &SshConfigReply) -> Result<Written> {
        // OpenSSH rejects a private key without its last newline.
        let key = format!("{}\n", config.private_key.trim_end());
        let known_hosts = format!("{} {}\n", config.name, config.host_key);
        let files = [(self.key(), key), (self.known_hosts(), known_hosts)];
        let is_same = |(path, text): &(PathBuf, String)| {
            std::fs::read(path).is_ok_and(|old| old == text.as_bytes())
        };
        if files.iter().all(is_same) {
            return Ok(Written::Unchanged);
        }
        create_private_dir(&self.dir)?;
        for (path, text) in files {
            write_private(&path, &text)?;
        }
        Ok(Written::Changed)
    }
}

/// Replaces a file that only this user can read. It need not survive a power cut.
pub(super) fn write_private(path: &Path, text: &str) -> Result<()> {
    let io = |e| Error::io(format!("write {}", path.display()), e);
    let dir = path.parent().unwrap_or(Path::new("."));
    // tempfile creates the file with mode 0600.
    let mut draft = tempfile::NamedTempFile::new_in(dir).map_err(io)?;
    draft.write_all(text.as_bytes()).map_err(io)?;
    draft.persist(path).map_err(|e| io(e.error))?;
    Ok(())
}
