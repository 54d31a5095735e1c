//! Stores and removes credentials the way docker does: with the helper that `config.json` names, or
//! else in the file itself.

use super::config::{self, Config};
use super::{Caller, helper, keys};
use crate::api::registry::Secret;
use crate::error::{Error, Result};
use crate::host::fs::{create_private_dir, write_durable};
use crate::locks::Cancel;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

const AUTHS: &str = "auths";
/// The mode of `config.json`, which may contain passwords.
const MODE: u32 = 0o600;

/// The place in which a credential was stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Place {
    /// A helper, by the name of its program.
    Helper(String),
    /// The file, unencrypted.
    File(PathBuf),
}

/// Stores the password of a user for a registry.
///
/// # Errors
/// Those of [`super::find`], and `invalid_argument` if there is no place for `config.json`.
pub(in crate::cli) fn store(
    registry: &str,
    (user, password): (&str, &Secret),
    caller: &Caller,
    cancel: &Cancel,
) -> Result<Place> {
    let path = file(caller)?;
    let config = Config::read(&path)?.unwrap_or_default();
    let key = keys(registry)[0];
    let Some(name) = config.helper(&[key]) else {
        let auth = config::encode(user, password);
        change(&path, |auths| {
            auths.insert(key.to_owned(), json!({ "auth": auth.reveal() }));
        })?;
        return Ok(Place::File(path));
    };
    let helper = helper::Helper::new(name, &path, &caller.environment)?;
    helper.store(key, user, password, cancel)?;
    // Docker, too, adds an empty entry for a registry whose credential a helper stores.
    change(&path, |auths| {
        auths.insert(key.to_owned(), json!({}));
    })?;
    Ok(Place::Helper(helper.program().to_owned()))
}

/// Removes the credential of a registry. Returns false if there was none.
pub(in crate::cli) fn remove(registry: &str, caller: &Caller, cancel: &Cancel) -> Result<bool> {
    let path = file(caller)?;
    let Some(config) = Config::read(&path)? else {
        return Ok(false);
    };
    let keys = keys(registry);
    let mut was_there = false;
    if let Some(name) = config.helper(&keys) {
        let helper = helper::Helper::new(name, &path, &caller.environment)?;
        was_there = helper.has(keys[0], cancel)?;
        if was_there {
            helper.erase(keys[0], cancel)?;
        }
    }
    if config.lists(&keys) {
        was_there = true;
        change(&path, |auths| {
            auths.retain(|name, _| !config::is_key(&keys, name));
        })?;
    }
    Ok(was_there)
}

fn file(caller: &Caller) -> Result<PathBuf> {
    let directory = caller.directory.as_ref().ok_or_else(|| {
        let text = "find docker's configuration: neither HOME nor DOCKER_CONFIG is set";
        Error::invalid(text).hint("set DOCKER_CONFIG to a directory")
    })?;
    Ok(directory.join("config.json"))
}

/// Changes the member `auths` of the file, and keeps everything else in it. The caller has already
/// read the file successfully.
fn change(path: &Path, change: impl FnOnce(&mut Map<String, Value>)) -> Result<()> {
    if let Some(directory) = path.parent()
        && !directory.exists()
    {
        create_private_dir(directory)?;
    }
    let mut whole = config::read_whole(path)?;
    let auths = whole.entry(AUTHS).or_insert_with(|| json!({}));
    if let Some(auths) = auths.as_object_mut() {
        change(auths);
    }
    let text = serde_json::to_string_pretty(&whole)
        .map_err(|e| Error::internal(format!("write docker's configuration: {e}")))?;
    // If the file is a symbolic link, replace its target and keep the link.
    let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    write_durable(&target, (text + "\n").as_bytes(), MODE)
}
