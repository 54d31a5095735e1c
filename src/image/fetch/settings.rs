//! The settings of a pull, which are sent to the helper process over its control channel.

use super::proxy::Proxies;
use crate::api::registry::Credential;
use crate::error::{Error, Result};
use crate::host::text::quoted;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The name of Docker Hub in references, and the host that serves its images.
const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";
/// The longest name that the distribution specification allows.
const NAME_BYTES_MAX: usize = 255;

/// A repository of a registry, as in a reference: `docker.io` and `library/gcc`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repository {
    /// `HOST` or `HOST:PORT`.
    pub registry: String,
    pub name: String,
}

impl Repository {
    /// Returns the host, with the port if there is one, that serves the repository.
    pub(super) fn authority(&self) -> &str {
        match self.registry.as_str() {
            DOCKER_HUB | "index.docker.io" => DOCKER_HUB_HOST,
            other => other,
        }
    }

    /// Returns the name as the registry knows it. Docker Hub's official images are below `library`.
    pub(super) fn path(&self) -> String {
        match self.authority() == DOCKER_HUB_HOST && !self.name.contains('/') {
            true => format!("library/{}", self.name),
            false => self.name.clone(),
        }
    }

    /// Checks that the name cannot change a URL's meaning. The reference parser is stricter.
    pub(super) fn check(&self) -> Result<()> {
        let is_component = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        match self.name.len() <= NAME_BYTES_MAX && self.name.split('/').all(is_component) {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "{} is not the name of a repository",
                quoted(&self.name)
            ))),
        }
    }
}

impl std::fmt::Display for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.registry, self.name)
    }
}

/// A token server on another host than its registry. Credentials for the registry are sent to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenServer {
    /// The registry's host, without a port.
    pub registry: String,
    /// The token server's host, without a port.
    pub host: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    pub repository: Repository,
    pub credential: Credential,
    /// Certificates of the trusted authorities, as PEM: the host's own store and private ones.
    pub authorities: String,
    pub proxies: Proxies,
    /// The registries, as `HOST` or `HOST:PORT`, that fcd may talk to without TLS. Loopback hosts
    /// are always among them.
    pub insecure: Vec<String>,
    pub token_servers: Vec<TokenServer>,
    pub limits: Limits,
}

impl Settings {
    /// Returns settings for an anonymous pull without a proxy.
    pub fn new(repository: Repository) -> Self {
        Self {
            repository,
            credential: Credential::Anonymous,
            authorities: String::new(),
            proxies: Proxies::default(),
            insecure: Vec::new(),
            token_servers: Vec::new(),
            limits: Limits::default(),
        }
    }
}

/// The bounds of everything that a registry decides.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// The time for resolving, connecting, the proxy's reply and the TLS handshake together.
    pub connect: Duration,
    /// The time for each of these steps: sending the request, and receiving the header of the
    /// reply.
    pub reply: Duration,
    /// The longest time without a byte.
    pub idle: Duration,
    /// A connection must deliver `rate_bytes_min` bytes in each `rate_window` that fcd waits for
    /// it.
    pub rate_window: Duration,
    pub rate_bytes_min: u64,
    /// The time for the body of a manifest, a token or an error, after its header.
    pub small_body: Duration,
    /// The time for all of a client's work, including that of its clones.
    pub total: Duration,
    /// How often in a row a request is repeated.
    pub retries: u32,
    /// The first pause before a repetition. Each further one is twice as long.
    pub retry_pause: Duration,
    /// The longest pause, even if `Retry-After` asks for more.
    pub retry_pause_max: Duration,
    pub redirects: u32,
    pub manifest_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(30),
            reply: Duration::from_secs(60),
            idle: Duration::from_secs(60),
            rate_window: Duration::from_secs(60),
            rate_bytes_min: 256 * 1024,
            small_body: Duration::from_secs(120),
            total: Duration::from_secs(6 * 3600),
            retries: 4,
            retry_pause: Duration::from_millis(500),
            retry_pause_max: Duration::from_secs(30),
            redirects: 5,
            // Docker's own limit.
            manifest_bytes: 4 << 20,
        }
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    fn repository(registry: &str, name: &str) -> Repository {
        Repository {
            registry: registry.into(),
            name: name.into(),
        }
    }

    #[test]
    fn docker_hub_has_another_host_and_a_library() {
        let hub = repository("docker.io", "gcc");
        assert_eq!(hub.authority(), "registry-1.docker.io");
        assert_eq!(hub.path(), "library/gcc");
        assert_eq!(repository("docker.io", "ann/app").path(), "ann/app");
        let other = repository("localhost:5000", "gcc");
        assert_eq!(other.authority(), "localhost:5000");
        assert_eq!(other.path(), "gcc");
    }

    #[test]
    fn names_that_change_the_url_are_refused() {
        for name in [
            "", "a//b", "../a", "a/../b", "a?b", "a b", "a%2f", "-a", "a\n",
        ] {
            assert!(repository("x", name).check().is_err(), "{name:?}");
        }
        for name in ["a", "a/b", "a.b_c-d/e__f"] {
            assert!(repository("x", name).check().is_ok(), "{name:?}");
        }
    }

    #[test]
    fn debug_hides_what_json_has() {
        use crate::api::registry::Secret;
        let mut settings = Settings::new(repository("x", "a"));
        settings.credential = Credential::Basic {
            user: "ann".into(),
            password: Secret::new("canary"),
        };
        settings.proxies.https = Some(Secret::new("http://ann:canary@proxy:3128"));
        assert!(!format!("{settings:?}").contains("canary"));
        let json = serde_json::to_string(&settings).unwrap();
        let back: Settings = serde_json::from_str(&json).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), json);
        assert_eq!(json.matches("canary").count(), 2);
    }
}
