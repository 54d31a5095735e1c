//! The section `[registry]`: how images are pulled.

use super::section::section;
use crate::error::{Error, Kind, Result};
use std::path::PathBuf;

section! {
    /// How images are pulled from registries.
    pub struct Registry {
        /// Registries, as `HOST` or `HOST:PORT`, that may be used without TLS. Loopback addresses
        /// always may.
        insecure: Vec<String> = Vec::new(),
        /// Files with certificates of private authorities, in PEM, in addition to the host's own.
        authorities: Vec<PathBuf> = Vec::new(),
        /// The proxy for `https` registries, such as `http://proxy.example:3128`. If it is empty,
        /// the daemon's variable `HTTPS_PROXY` applies.
        https_proxy: String = String::new(),
        /// The proxy for `http` registries. If it is empty, the daemon's variable `HTTP_PROXY`
        /// applies.
        http_proxy: String = String::new(),
        /// Hosts that are reached without a proxy, separated by commas. If it is empty, the
        /// daemon's variable `NO_PROXY` applies.
        no_proxy: String = String::new(),
        /// Registries whose token server is on another host, as `REGISTRY=HOST`. Credentials for
        /// the registry are sent to that host. The token server of Docker Hub is built in.
        token_servers: Vec<String> = Vec::new(),
        /// Pulls that run at the same time. Others wait. If it is more than one, no user can occupy
        /// all places: the last one is for another user.
        pulls_max: usize = 3,
        /// Pulls, registrations, promotions, exports and builds of one user, running and waiting.
        pulls_per_uid_max: usize = 4,
        /// Size of the cache of unpacked layers in bytes. The least recently used ones are removed.
        cache_bytes_max: u64 = 20 << 30,
        /// Space in bytes that the images of one user may take on the host. Files that several
        /// names of an image share count once. Root and the daemon's own user have no limit.
        image_bytes_per_uid_max: u64 = 64 << 30,
    }
}

/// A registry and the host of its token server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenServer {
    pub registry: String,
    pub host: String,
}

impl Registry {
    /// Returns the configured token servers.
    ///
    /// # Errors
    /// `invalid_config` for an entry that is not `REGISTRY=HOST`.
    pub fn token_servers(&self) -> Result<Vec<TokenServer>> {
        let parse = |text: &String| match text.split_once('=') {
            Some((registry, host)) if !registry.is_empty() && !host.is_empty() => Ok(TokenServer {
                registry: registry.to_owned(),
                host: host.to_owned(),
            }),
            _ => Err(Error::new(
                Kind::InvalidConfig,
                format!("registry.token_servers: {text:?} is not REGISTRY=HOST"),
            )),
        };
        self.token_servers.iter().map(parse).collect()
    }
}

pub(super) fn validate(registry: &Registry) -> Result<()> {
    if registry.pulls_max == 0 || registry.pulls_per_uid_max == 0 {
        return Err(Error::new(
            Kind::InvalidConfig,
            "registry.pulls_max and registry.pulls_per_uid_max must be at least 1",
        ));
    }
    registry.token_servers().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_server_has_a_registry_and_a_host() {
        let with = |text: &str| Registry {
            token_servers: vec![text.to_owned()],
            ..Registry::default()
        };
        let server = TokenServer {
            registry: "registry.example".to_owned(),
            host: "auth.example".to_owned(),
        };
        let good = with("registry.example=auth.example");
        assert_eq!(good.token_servers().unwrap(), [server]);
        for bad in ["registry.example", "=x", "x="] {
            assert!(validate(&with(bad)).is_err(), "{bad}");
        }
    }
}
