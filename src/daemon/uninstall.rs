//! Removes the installation: what this daemon has on the host, and its state directory.
//!
//! `fcctl system uninstall` deletes the VMs first, each with the ordinary operation, so that an
//! interrupted uninstallation leaves a smaller but sound installation. Then one call makes the
//! daemon refuse all other calls and exit. As it exits, the daemon removes the rest, once nothing
//! uses it any more. Files in the state directory that fcd did not make are kept.

use super::core::{Core, VMS_DIR};
use super::snapshot_registry::SNAPSHOTS_DIR;
use crate::api::daemon::{InstalledItem, UninstallReply, UninstallRequest};
use crate::error::{Error, Kind, Result};
use crate::host::Commands;
use crate::host::fs::remove_tree;
use crate::locks::CancelCause;
use crate::net;
use crate::vmm::firecracker;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The file whose lock the running daemon holds. It is removed last.
pub const LOCK_FILE: &str = "lock";
/// The names that fcd uses in its state directory. `fcd.log` is the log of a daemon that
/// scripts/quickstart has started.
const OWN_NAMES: &[&str] = &[
    VMS_DIR,
    SNAPSHOTS_DIR,
    "images",
    "kernels",
    "layers",
    "runtimes",
    "reserve",
    "fcd.log",
    LOCK_FILE,
];
/// The database, its write-ahead log and its backups.
const OWN_PREFIX: &str = "fcd.db";
/// The name of the directory that fcd makes for its socket.
const SOCKET_DIR: &str = "fcd";
/// The maximum number of kept files that a reply names.
const KEPT_SHOWN_MAX: usize = 100;

/// Removes the installation on request.
pub struct Uninstaller {
    pub(super) core: Core,
    pub(super) socket: PathBuf,
    pub(super) has_bridge: bool,
    pub(super) commands: Arc<dyn Commands>,
}

impl Uninstaller {
    /// Reports what belongs to the installation. Unless it is a dry run, also makes the daemon exit
    /// and remove it.
    ///
    /// # Errors
    /// `conflict` while there are VMs.
    pub fn uninstall(&self, request: UninstallRequest) -> Result<UninstallReply> {
        let reply = self.inventory()?;
        if !request.dry_run {
            self.require_no_vms()?;
            log::info!("removing this installation");
            self.core.uninstalling.cancel(CancelCause::Requested);
        }
        Ok(reply)
    }

    /// True once a caller has asked for the removal.
    pub fn is_asked_for(&self) -> bool {
        self.core.uninstalling.is_cancelled()
    }

    fn require_no_vms(&self) -> Result<()> {
        let names: Vec<_> = self
            .core
            .store
            .read(|s| s.vms().take(4).map(|row| row.name.to_string()).collect());
        if names.is_empty() {
            return Ok(());
        }
        let text = format!("uninstall: there are VMs: {}", names.join(", "));
        Err(Error::new(Kind::Conflict, text).hint("fcctl system uninstall deletes them first"))
    }

    fn inventory(&self) -> Result<UninstallReply> {
        let mut items = Vec::new();
        let mut add = |kind: &str, name: String| {
            items.push(InstalledItem {
                kind: kind.to_owned(),
                name,
            });
        };
        add("directory", self.core.state_dir.display().to_string());
        add("socket", self.socket.display().to_string());
        if self.has_bridge {
            let found = net::gone::all(self.core.store.install_id(), &self.commands)?;
            found.taps.into_iter().for_each(|name| add("tap", name));
            let bridges = found.bridges.into_iter();
            bridges.for_each(|name| add("bridge", name));
            let tables = found.tables.into_iter();
            tables.for_each(|name| add("table", name));
        }
        let foreign = entries(&self.core.state_dir)?.into_iter();
        let foreign = foreign.filter(|path| !is_own(path, &self.socket));
        Ok(UninstallReply {
            items,
            kept: foreign
                .take(KEPT_SHOWN_MAX)
                .map(|path| path.display().to_string())
                .collect(),
        })
    }

    /// Removes everything. The daemon and its socket must be closed.
    ///
    /// # Errors
    /// `conflict` if a VM was created in the meantime, or the first error. In both cases, a part of
    /// the installation remains.
    pub fn remove(&self) -> Result<()> {
        self.require_no_vms()?;
        if self.has_bridge {
            let left = net::gone::look(self.core.store.install_id(), &self.commands)?;
            if left.is_in_use {
                let text = "remove the bridge: something else uses it";
                return Err(Error::new(Kind::Conflict, text).hint("ip link show type bridge"));
            }
            net::gone::remove(&left, &self.commands)?;
        }
        if let Some(group) = firecracker::empty_group(self.core.store.install_id()) {
            firecracker::remove_group(&group)?;
        }
        remove_socket_dir(&self.socket);
        remove_state_dir(&self.core.state_dir, &self.socket)
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    crate::locks::may_block("file access");
    let list = || -> io::Result<Vec<PathBuf>> {
        std::fs::read_dir(dir)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    list().map_err(|e| Error::io(format!("list {}", dir.display()), e))
}

/// True if fcd has made this entry of the state directory.
fn is_own(path: &Path, socket: &Path) -> bool {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return false;
    };
    path == socket || OWN_NAMES.contains(&name) || name.starts_with(OWN_PREFIX)
}

/// Removes the directory of the socket if fcd has made it and nothing else is in it.
fn remove_socket_dir(socket: &Path) {
    crate::locks::may_block("file access");
    let dir = socket.parent().filter(|dir| dir.ends_with(SOCKET_DIR));
    if let Some(dir) = dir {
        // This fails if the directory contains other files, and is meant to.
        let _ = std::fs::remove_dir(dir);
    }
}

/// Removes what fcd has made in the state directory, and then the directory itself if it is empty.
fn remove_state_dir(dir: &Path, socket: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    let doing = |path: &Path| format!("remove {}", path.display());
    let mut own: Vec<_> = entries(dir)?;
    own.retain(|path| is_own(path, socket));
    own.sort_by_key(|path| path.ends_with(LOCK_FILE));
    for path in own {
        remove(&path).map_err(|e| Error::io(doing(&path), e))?;
    }
    match std::fs::remove_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {
            let shown = dir.display();
            log::info!("keeping {shown}: it contains files that fcd did not make");
            Ok(())
        }
        removed => removed.map_err(|e| Error::io(doing(dir), e)),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    crate::locks::may_block("file access");
    match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => remove_tree(path),
        Ok(_) => std::fs::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_others_keep_the_state_directory() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let own = [
            "lock",
            "fcd.db",
            "fcd.db-wal",
            "fcd.db.v3.bak",
            "fcd.sock",
            "fcd.log",
        ];
        let fill = || {
            std::fs::create_dir_all(state.join("images/default")).unwrap();
            std::fs::create_dir_all(state.join("vms")).unwrap();
            for name in own {
                std::fs::write(state.join(name), "").unwrap();
            }
            std::os::unix::fs::symlink(dir.path().join("precious"), state.join("layers")).unwrap();
        };
        std::fs::create_dir(dir.path().join("precious")).unwrap();
        let socket = state.join("fcd.sock");
        fill();
        std::fs::write(state.join("notes"), "mine").unwrap();
        remove_state_dir(&state, &socket).unwrap();
        assert_eq!(entries(&state).unwrap(), [state.join("notes")]);
        fill();
        std::fs::remove_file(state.join("notes")).unwrap();
        remove_state_dir(&state, &socket).unwrap();
        assert!(!state.exists());
        assert!(
            dir.path().join("precious").is_dir(),
            "a link is not followed"
        );
    }

    #[test]
    fn only_an_empty_directory_named_fcd_goes_with_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let (own, other) = (dir.path().join("fcd"), dir.path().join("run"));
        std::fs::create_dir(&own).unwrap();
        std::fs::create_dir(&other).unwrap();
        std::fs::write(own.join("note"), "").unwrap();
        remove_socket_dir(&own.join("fcd.sock"));
        remove_socket_dir(&other.join("fcd.sock"));
        assert!(own.exists() && other.exists());
        std::fs::remove_file(own.join("note")).unwrap();
        remove_socket_dir(&own.join("fcd.sock"));
        assert!(!own.exists());
    }
}
