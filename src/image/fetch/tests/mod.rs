//! Tests with registries on loopback: a hostile one in this process, and Debian's docker-registry.

mod authentication;
mod blobs;
mod debian;
mod fake;
mod hostile;
mod proxies;

use super::*;
use crate::api::registry::{Credential, Secret};
use crate::error::{Error, Kind, Result};
use crate::host::hex;
use crate::locks::Cancel;
use crate::sched::Instant;
use fake::{Answer, Asked, Fake};
use sha2::{Digest, Sha256};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const OCI: &str = "application/vnd.oci.image.manifest.v1+json";

fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(&Sha256::digest(bytes)))
}

/// Returns limits that make a hostile registry fail soon.
fn limits() -> Limits {
    Limits {
        connect: Duration::from_secs(20),
        reply: Duration::from_millis(500),
        idle: Duration::from_secs(20),
        rate_window: Duration::from_millis(300),
        rate_bytes_min: 10_000,
        small_body: Duration::from_secs(20),
        total: Duration::from_secs(60),
        retries: 2,
        retry_pause: Duration::from_millis(1),
        retry_pause_max: Duration::from_millis(2),
        redirects: 3,
        manifest_bytes: 10_000,
    }
}

fn settings(registry: &str) -> Settings {
    let mut settings = Settings::new(Repository {
        registry: registry.to_owned(),
        name: "app".to_owned(),
    });
    settings.limits = Limits {
        reply: Duration::from_secs(20),
        rate_window: Duration::from_secs(20),
        ..limits()
    };
    settings
}

fn basic() -> Credential {
    Credential::Basic {
        user: "ann".into(),
        password: Secret::new("canary"),
    }
}

/// Connects every name to one address, and refuses what [`SystemDialer`] would refuse by name.
struct To(SocketAddr);

impl Dial for To {
    fn dial(&self, _: &Target, _: Instant, _: &Cancel) -> Result<TcpStream> {
        Ok(TcpStream::connect(self.0).unwrap())
    }
}

/// Returns a client of a registry on loopback, by its address.
fn client(settings: Settings) -> Client {
    Client::new(settings, Arc::new(SystemDialer), Cancel::try_new().unwrap()).unwrap()
}

/// Returns a client that knows a fake registry as `registry.example`, without TLS.
fn client_by_name(fake: &Fake, change: impl FnOnce(&mut Settings)) -> Client {
    let mut settings = settings("registry.example");
    settings.insecure = vec!["registry.example".into()];
    change(&mut settings);
    let dial = Arc::new(To(fake.address));
    Client::new(settings, dial, Cancel::try_new().unwrap()).unwrap()
}

fn tag() -> Selector {
    Selector::Tag("v1".into())
}

fn manifest(bytes: &[u8]) -> Answer {
    Answer::new(200).header("Content-Type", OCI).body(bytes)
}

#[track_caller]
fn fails(result: Result<impl std::fmt::Debug>, kind: Kind) -> String {
    let e = result.unwrap_err();
    assert_eq!(e.kind(), kind, "{e:?}");
    assert!(!format!("{e:?}").contains("canary"), "{e:?}");
    e.to_string()
}

#[test]
fn manifest_is_fetched_by_tag_and_by_digest() {
    let bytes = br#"{"schemaVersion":2}"#;
    let fake =
        Fake::start(move |_| manifest(bytes).header("Docker-Content-Digest", &sha256(bytes)));
    let mut client = client(settings(&fake.name()));
    let found = client.manifest(&tag()).unwrap();
    assert_eq!(found.bytes, bytes);
    assert_eq!(found.media_type, OCI);
    assert_eq!(found.digest, sha256(bytes));
    let by_digest = Selector::Digest(sha256(bytes));
    assert_eq!(client.clone().manifest(&by_digest).unwrap(), found);
    let seen = fake.seen();
    assert_eq!(seen[0].path, "/v2/app/manifests/v1");
    assert_eq!(seen[1].path, format!("/v2/app/manifests/{}", sha256(bytes)));
    assert!(seen[0].header("accept").unwrap().contains(OCI));
    assert!(seen[0].header("accept-encoding").is_none());
    assert!(seen[0].header("authorization").is_none());
}

#[test]
fn media_type_may_have_parameters() {
    let fake = Fake::start(|_| {
        Answer::new(200)
            .header(
                "Content-Type",
                &format!("{}; charset=utf-8", OCI.to_uppercase()),
            )
            .body(b"{}")
    });
    let found = client(settings(&fake.name())).manifest(&tag()).unwrap();
    assert_eq!(found.media_type, OCI);
}

#[test]
fn missing_image_is_not_found() {
    let body = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;
    let fake = Fake::start(|_| Answer::new(404).body(body));
    let result = client(settings(&fake.name())).manifest(&tag());
    let text = fails(result, Kind::ReferenceNotFound);
    assert!(text.contains("fetch manifest v1 of 127.0.0.1:"), "{text}");
    assert!(
        text.ends_with("does not have it: MANIFEST_UNKNOWN: manifest unknown"),
        "{text}"
    );
    assert_eq!(fake.seen().len(), 1);
}

#[test]
fn closed_port_is_unreachable() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let name = listener.local_addr().unwrap().to_string();
    drop(listener);
    fails(
        client(settings(&name)).manifest(&tag()),
        Kind::RegistryUnreachable,
    );
}

/// A dialer that refuses every connection and counts them.
struct Refusing(AtomicUsize);

impl Dial for Refusing {
    fn dial(&self, target: &Target, _: Instant, _: &Cancel) -> Result<TcpStream> {
        self.0.fetch_add(1, Ordering::SeqCst);
        assert_eq!((target.port, target.reach), (443, Reach::Loopback));
        Err(Error::new(Kind::RegistryUnreachable, "refused"))
    }
}

#[test]
fn registry_that_never_answered_is_tried_twice() {
    let dial = Arc::new(Refusing(AtomicUsize::new(0)));
    let cancel = Cancel::try_new().unwrap();
    let settings = settings("registry.example");
    let mut client = Client::new(settings, Arc::clone(&dial) as Arc<dyn Dial>, cancel).unwrap();
    fails(client.manifest(&tag()), Kind::RegistryUnreachable);
    assert_eq!(dial.0.load(Ordering::SeqCst), 2);
}

#[test]
fn malformed_registries_are_refused_before_a_connection() {
    for registry in ["", "a b", "a/b", "a@b", "127.1", "a:0", "a:b", "[::1"] {
        let e = Client::new(
            settings(registry),
            Arc::new(SystemDialer),
            Cancel::try_new().unwrap(),
        );
        assert_eq!(e.err().unwrap().kind(), Kind::InvalidArgument, "{registry}");
    }
}

/// Returns a function that gives the answers in order and repeats the last one.
fn counted(answers: Vec<Answer>) -> impl Fn(&Asked) -> Answer + Send + Sync {
    move |asked| answers[asked.number.min(answers.len() - 1)].clone()
}
