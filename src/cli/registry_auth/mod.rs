//! Finds the credential for a registry where docker keeps it: `config.json` and the credential
//! helpers that it names. All of this runs with the caller's rights. The daemon gets only the
//! credential, over a pipe.

mod config;
mod helper;
mod login;
#[cfg(test)]
mod tests;

use super::context::Env;
use crate::api::registry::Credential;
use crate::error::Result;
use crate::locks::Cancel;
use config::Config;
pub(super) use login::{Place, remove, store};
use std::ffi::OsString;
use std::path::PathBuf;

/// The key of Docker Hub in `config.json`.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// The part of the caller's environment that docker uses.
pub(super) struct Caller {
    /// The directory of `config.json`, if the environment determines it.
    directory: Option<PathBuf>,
    /// The whole environment, which helpers need to find their keys and buses.
    environment: Vec<(OsString, OsString)>,
}

impl Caller {
    pub(super) fn new(env: &Env, environment: Vec<(OsString, OsString)>) -> Self {
        let set = |name: &str| env(name).filter(|value| !value.is_empty());
        let home = || set("HOME").map(|home| PathBuf::from(home).join(".docker"));
        Self {
            directory: set("DOCKER_CONFIG").map(PathBuf::from).or_else(home),
            environment,
        }
    }
}

/// Returns the credential that docker would use for a registry, which is `HOST` or `HOST:PORT` as
/// in a reference.
///
/// # Errors
/// `invalid_config` (a malformed file or helper), `command_missing`, `command_failed` and `timeout`
/// (a helper), `host` (an unreadable file), `cancelled`.
pub(super) fn find(registry: &str, caller: &Caller, cancel: &Cancel) -> Result<Credential> {
    let Some(directory) = &caller.directory else {
        return Ok(Credential::Anonymous);
    };
    let path = directory.join("config.json");
    let Some(config) = Config::read(&path)? else {
        return Ok(Credential::Anonymous);
    };
    let keys = keys(registry);
    match config.helper(&keys) {
        Some(name) => helper::Helper::new(name, &path, &caller.environment)?.get(keys[0], cancel),
        None => config.stored(&keys, &path),
    }
}

/// Returns the names that a registry may have in `config.json`. The first one is docker's own.
fn keys(registry: &str) -> Vec<&str> {
    match registry {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => {
            vec![
                DOCKER_HUB_KEY,
                "docker.io",
                "index.docker.io",
                "registry-1.docker.io",
            ]
        }
        other => vec![other],
    }
}
