//! The directories in which fcctl keeps the keys of VMs, for ssh.

use super::context::Env;
use crate::host::hex;
use sha2::{Digest, Sha256};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// How many bytes of the hash of a socket's path are in the name of a directory.
const HASH_BYTES: usize = 4;

/// Returns the directory with this user's keys for the VMs of one daemon. None if the user has no
/// home directory.
pub(super) fn of_daemon(env: &Env, socket: &Path) -> Option<PathBuf> {
    let dir = |name: &str| env(name).filter(|v| v.starts_with('/')).map(PathBuf::from);
    let state = dir("XDG_STATE_HOME").or_else(|| Some(dir("HOME")?.join(".local/state")))?;
    let hash = Sha256::digest(socket.as_os_str().as_bytes());
    let of_socket = hex::encode(&hash[..HASH_BYTES]);
    Some(state.join("fcctl/ssh").join(of_socket))
}
