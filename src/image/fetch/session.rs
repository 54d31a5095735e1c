//! Sends requests to one registry: decides about TLS, authenticates, follows redirects and retries.

use super::address;
use super::auth;
use super::challenge;
use super::dial::Dial;
use super::http::{Http, Request};
use super::redirect;
use super::reply::Reply;
use super::settings::{Limits, Settings};
use super::transport::Network;
use super::url::{Origin, Scheme, Url, split_authority};
use crate::api::registry::Secret;
use crate::error::{Error, Kind, Result};
use crate::host::wait::{cancelled, sleep};
use crate::locks::Cancel;
use crate::sched::Instant;
use std::sync::Arc;
use std::time::Duration;
use ureq::http::header::{LOCATION, WWW_AUTHENTICATE};

/// A clone shares connections and starts with the same token.
#[derive(Clone)]
pub(super) struct Session {
    http: Http,
    settings: Arc<Settings>,
    /// The origin of the registry, which is unknown before the first request: that request may have
    /// to find out whether the registry speaks TLS.
    registry: Option<Origin>,
    has_answered: bool,
    authorization: Option<Secret>,
}

/// A request to the registry.
#[derive(Clone)]
pub(super) struct Wanted {
    /// The path below `/v2/`.
    pub(super) path: String,
    pub(super) accept: &'static str,
    pub(super) from: Option<u64>,
}

impl Session {
    pub(super) fn new(settings: Settings, dial: Arc<dyn Dial>, cancel: Cancel) -> Result<Self> {
        settings.repository.check()?;
        let host = match split_authority(settings.repository.authority()) {
            Ok((host, _)) => host,
            Err(why) => {
                let name = crate::host::text::quoted(&settings.repository.registry);
                return Err(Error::invalid(format!("{name} is not a registry")).with_source(why));
            }
        };
        let network = Network {
            dial,
            proxies: settings.proxies.clone(),
            limits: settings.limits.clone(),
            cancel,
            end: Instant::now() + settings.limits.total,
            local_hosts: local_hosts(&settings, &host),
        };
        Ok(Self {
            http: Http::new(&settings, Arc::new(network))?,
            settings: Arc::new(settings),
            registry: None,
            has_answered: false,
            authorization: None,
        })
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.settings.limits
    }

    /// Sends a request and repeats it while the registry is busy or unreachable. The caller handles
    /// the status, which is never a redirect, 401, 429 or 5xx.
    ///
    /// # Errors
    /// `registry_unreachable`, `registry_busy`, `registry_denied`, `registry_untrusted`,
    /// `registry_invalid`, `unsupported` (an unknown authentication), `timeout`, `cancelled`.
    pub(super) fn get(&mut self, wanted: &Wanted) -> Result<Reply> {
        let mut repetitions = 0;
        loop {
            let (error, after) = match self.get_once(wanted) {
                Ok(reply) if matches!(reply.status, 429 | 500..=599) => {
                    let after = reply.retry_after();
                    (busy(reply), after)
                }
                Ok(reply) => return Ok(reply),
                Err(e) if matches!(e.kind(), Kind::RegistryUnreachable | Kind::RegistryBusy) => {
                    (e, None)
                }
                Err(e) => return Err(e),
            };
            // A registry that has never answered may be a mistyped name.
            let max = match self.has_answered {
                true => self.limits().retries,
                false => self.limits().retries.min(1),
            };
            if repetitions >= max {
                return Err(error);
            }
            self.pause(repetitions, after)?;
            repetitions += 1;
        }
    }

    /// Waits before the next repetition, for as long as the registry asks, within limits.
    pub(super) fn pause(&self, repetitions: u32, after: Option<Duration>) -> Result<()> {
        let limits = self.limits();
        let own = limits.retry_pause.saturating_mul(1 << repetitions.min(16));
        let pause = own
            .max(after.unwrap_or_default())
            .min(limits.retry_pause_max);
        let network = self.http.network();
        let left = network.end.saturating_duration_since(Instant::now());
        let doing = "wait for a registry";
        match sleep(pause.min(left), &network.cancel) {
            Ok(true) => Ok(()),
            Ok(false) => Err(cancelled(doing, &network.cancel)),
            Err(e) => Err(Error::io(doing, e)),
        }
    }

    /// Sends a request, and sends it once more if the registry requires authentication.
    fn get_once(&mut self, wanted: &Wanted) -> Result<Reply> {
        let registry = self.registry()?;
        let reply = self.follow(&registry, wanted)?;
        self.has_answered = true;
        if reply.status != 401 {
            return Ok(reply);
        }
        self.authenticate(&registry, &reply)?;
        let reply = self.follow(&registry, wanted)?;
        match reply.status {
            401 => Err(self.denied(reply)),
            _ => Ok(reply),
        }
    }

    /// Returns the error for a reply whose status is not the wanted one.
    pub(super) fn refusal(&self, reply: Reply) -> Error {
        let (origin, status) = (reply.origin.clone(), reply.status);
        let error = match status {
            403 => return self.denied(reply),
            404 => Error::new(
                Kind::ReferenceNotFound,
                format!("{origin} does not have it"),
            )
            .hint("check the name and the tag"),
            _ => Error::new(Kind::RegistryInvalid, format!("{origin} answers {status}")),
        };
        match reply.into_message() {
            Some(message) => error.with_source(message),
            None => error,
        }
    }

    fn denied(&self, reply: Reply) -> Error {
        let error = auth::denied(&self.settings);
        match reply.into_message() {
            Some(message) => error.with_source(message),
            None => error,
        }
    }

    fn authenticate(&mut self, registry: &Origin, reply: &Reply) -> Result<()> {
        if reply.origin != *registry {
            let why = format!(
                "{registry} redirects to {}, which requires a login",
                reply.origin
            );
            return Err(Error::new(Kind::RegistryDenied, why));
        }
        let challenge = challenge::choose(reply.headers(WWW_AUTHENTICATE));
        let answer = auth::answer(&self.http, &self.settings, registry, challenge)?;
        self.authorization = Some(answer);
        Ok(())
    }

    /// Sends a request and follows redirects. Only the registry itself gets the authorization.
    fn follow(&self, registry: &Origin, wanted: &Wanted) -> Result<Reply> {
        let mut url = self.url(registry.scheme, &format!("/v2/{}", wanted.path))?;
        for _ in 0..=self.limits().redirects {
            let mut request = Request::get(url.clone(), wanted.accept);
            request.from = wanted.from;
            if url.origin == *registry {
                request.authorization = self.authorization.clone();
            }
            let reply = self.http.send(&request)?;
            if !matches!(reply.status, 301 | 302 | 303 | 307 | 308) {
                return Ok(reply);
            }
            let location = reply.header(LOCATION).ok_or_else(|| {
                let why = format!("{} redirects without a Location header", url.origin);
                Error::new(Kind::RegistryInvalid, why)
            })?;
            url = redirect::next(&url, location, |to| is_insecure(&self.settings, &to.origin))?;
        }
        let max = self.limits().redirects;
        Err(Error::new(
            Kind::RegistryInvalid,
            format!("{registry} redirects more than {max} times"),
        ))
    }

    fn url(&self, scheme: Scheme, path: &str) -> Result<Url> {
        Url::new(
            scheme,
            self.settings.repository.authority(),
            path.to_owned(),
        )
        .map_err(|why| Error::invalid("the registry's name is malformed").with_source(why))
    }

    /// Returns the registry's origin. If the registry may be without TLS, this first tries whether
    /// it speaks TLS.
    fn registry(&mut self) -> Result<Origin> {
        if let Some(registry) = &self.registry {
            return Ok(registry.clone());
        }
        let secure = self.url(Scheme::Https, "/v2/")?;
        let plain = self.url(Scheme::Http, "/v2/")?;
        let chosen = match is_insecure(&self.settings, &plain.origin) {
            false => secure.origin,
            true => match self.http.send(&Request::get(secure.clone(), "*/*")) {
                Ok(_) => secure.origin,
                Err(e) if e.kind() == Kind::RegistryUnreachable => {
                    match self.http.send(&Request::get(plain.clone(), "*/*")) {
                        Ok(_) => plain.origin,
                        Err(other) if other.kind() == Kind::RegistryUnreachable => return Err(e),
                        Err(other) => return Err(other),
                    }
                }
                Err(e) => return Err(e),
            },
        };
        self.registry = Some(chosen.clone());
        Ok(chosen)
    }
}

/// True if fcd may talk to an origin without TLS: one on loopback, or a configured one.
fn is_insecure(settings: &Settings, origin: &Origin) -> bool {
    let is_configured = |entry: &String| match split_authority(entry) {
        Ok((host, port)) => host == origin.host && port.is_none_or(|port| port == origin.port),
        Err(_) => false,
    };
    address::is_loopback(&origin.host) || settings.insecure.iter().any(is_configured)
}

/// Returns the hosts that may have a loopback address: those that the user or the administrator
/// named, and loopback itself if the registry is on loopback.
fn local_hosts(settings: &Settings, registry: &str) -> Vec<String> {
    let mut hosts = auth::trusted_hosts(settings, registry);
    if address::is_loopback(registry) {
        hosts.extend(["localhost", "127.0.0.1", "[::1]"].map(str::to_owned));
    }
    hosts
}

fn busy(reply: Reply) -> Error {
    let (origin, status) = (reply.origin.clone(), reply.status);
    let error = Error::new(Kind::RegistryBusy, format!("{origin} answers {status}"));
    let error = match reply.into_message() {
        Some(message) => error.with_source(message),
        None => error,
    };
    match status {
        429 => error.hint("wait, or log in: many registries limit anonymous pulls"),
        _ => error.hint("try again later"),
    }
}
