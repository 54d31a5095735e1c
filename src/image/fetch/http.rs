//! One HTTP exchange: a request, and a reply whose body is still to be read.

use super::reply::{Reply, from_ureq};
use super::settings::Settings;
use super::transport::{Network, NoResolver, Sockets};
use super::url::{Origin, Url};
use crate::api::registry::Secret;
use crate::error::{Error, Kind, Result};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use std::sync::Arc;
use ureq::http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RANGE};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::unversioned::transport::{Connector, RustlsConnector};

/// The size limit of a reply's header.
const HEADER_BYTES_MAX: usize = 64 * 1024;

pub(super) struct Request {
    pub(super) url: Url,
    pub(super) accept: &'static str,
    pub(super) authorization: Option<Secret>,
    /// The offset of the first byte to fetch, or None for the whole body.
    pub(super) from: Option<u64>,
    /// The form to POST, or None for a GET.
    pub(super) form: Option<Secret>,
}

impl Request {
    pub(super) fn get(url: Url, accept: &'static str) -> Self {
        Self {
            url,
            accept,
            authorization: None,
            from: None,
            form: None,
        }
    }
}

/// Sends requests. A clone shares the connections.
#[derive(Clone)]
pub(super) struct Http {
    agent: ureq::Agent,
    network: Arc<Network>,
}

impl Http {
    /// Creates a client.
    ///
    /// # Errors
    /// `invalid_argument` if the authorities' certificates are not PEM, or if none of them is
    /// usable.
    pub(super) fn new(settings: &Settings, network: Arc<Network>) -> Result<Self> {
        let certificates = parse_authorities(&settings.authorities)?;
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::new_with_certs(&certificates))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let limits = &settings.limits;
        let config = ureq::Agent::config_builder()
            .tls_config(tls)
            .proxy(None)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_response_header_size(HEADER_BYTES_MAX)
            .user_agent(concat!("fcd/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(limits.connect))
            .timeout_send_request(Some(limits.reply))
            .timeout_send_body(Some(limits.reply))
            .timeout_recv_response(Some(limits.reply))
            .build();
        let connector = Sockets(Arc::clone(&network)).chain(RustlsConnector::default());
        Ok(Self {
            agent: ureq::Agent::with_parts(config, connector, NoResolver),
            network,
        })
    }

    pub(super) fn network(&self) -> &Network {
        &self.network
    }

    /// Sends one request. The caller handles redirects and statuses.
    pub(super) fn send(&self, request: &Request) -> Result<Reply> {
        let origin = &request.url.origin;
        let network = &self.network;
        if network.cancel.is_cancelled() {
            let doing = format!("ask {origin}");
            return Err(crate::host::wait::cancelled(&doing, &network.cancel));
        }
        let sent = match &request.form {
            None => self
                .agent
                .run(head(request, "GET").body(()).map_err(malformed)?),
            Some(form) => {
                let head =
                    head(request, "POST").header(CONTENT_TYPE, "application/x-www-form-urlencoded");
                let body = form.reveal().to_owned();
                self.agent.run(head.body(body).map_err(malformed)?)
            }
        };
        match sent {
            Ok(response) => Ok(Reply::new(origin.clone(), response, network)),
            Err(e) => Err(from_ureq(e).in_exchange_with(origin)),
        }
    }
}

fn head(request: &Request, method: &str) -> ureq::http::request::Builder {
    let mut head = ureq::http::Request::builder()
        .method(method)
        .uri(request.url.to_request())
        .header(ACCEPT, request.accept);
    if let Some(value) = &request.authorization {
        head = head.header(AUTHORIZATION, value.reveal());
    }
    if let Some(from) = request.from {
        head = head.header(RANGE, format!("bytes={from}-"));
    }
    head
}

/// Returns the error for a credential or token that contains characters that a header cannot have.
/// The error does not show it.
fn malformed(_: ureq::http::Error) -> Error {
    Error::invalid("the credential for the registry has characters that HTTP does not allow")
}

/// Parses certificates in PEM. Ignores certificates that cannot be used, because the host's store
/// has some that only some libraries accept. Fails if there is text but no usable certificate.
fn parse_authorities(pem: &str) -> Result<Vec<Certificate<'static>>> {
    let invalid = |why: &str| {
        Error::new(
            Kind::InvalidArgument,
            format!("the certificates of authorities are not usable: {why}"),
        )
    };
    let mut found = Vec::new();
    for item in parse_pem(pem.as_bytes()) {
        match item.map_err(|_| invalid("they are not PEM"))? {
            PemItem::Certificate(certificate) => found.push(certificate),
            PemItem::PrivateKey(_) => return Err(invalid("there is a private key among them")),
            _ => {}
        }
    }
    let mut store = RootCertStore::empty();
    let der = found.iter().map(|c| CertificateDer::from(c.der()));
    let (usable, _) = store.add_parsable_certificates(der);
    match usable > 0 || pem.trim().is_empty() {
        true => Ok(found),
        false => Err(invalid("there is no certificate of an authority")),
    }
}

/// Adds the peer's name to an error of an exchange.
trait InExchange {
    fn in_exchange_with(self, origin: &Origin) -> Self;
}

impl InExchange for Error {
    fn in_exchange_with(self, origin: &Origin) -> Self {
        let error = self.context(format!("ask {origin}"));
        match error.kind() {
            Kind::RegistryUntrusted if error.hint_text().is_none() => error.hint(format!(
                "add the authority that signed the certificate of {} to the host's store \
                 (/usr/local/share/ca-certificates, then update-ca-certificates)",
                origin.host
            )),
            _ => error,
        }
    }
}
