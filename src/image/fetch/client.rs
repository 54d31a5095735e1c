//! Fetches manifests and blobs of one repository.

use super::blob::Blob;
use super::dial::Dial;
use super::reply::Reply;
use super::session::{Session, Wanted};
use super::settings::Settings;
use crate::api::image::MANIFEST_TYPES;
use crate::error::{Error, Kind, Result};
use crate::host::hex;
use crate::host::text::quoted;
use crate::locks::Cancel;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::sync::Arc;

/// [`MANIFEST_TYPES`] as the value of `Accept`.
const ACCEPT_MANIFEST: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";
/// The beginning of the media types of Docker's first format, which has no digests of layers.
const OLD_TYPE_PREFIX: &str = "application/vnd.docker.distribution.manifest.v1+";
const CONTENT_DIGEST: &str = "docker-content-digest";
const TAG_BYTES_MAX: usize = 128;

/// The manifest of a repository to fetch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selector {
    Tag(String),
    /// `sha256:` and 64 hexadecimal digits.
    Digest(String),
}

impl Selector {
    fn check(&self) -> Result<&str> {
        match self {
            Self::Digest(digest) => check_digest(digest).map(|()| digest.as_str()),
            Self::Tag(tag) => {
                let is_valid = (1..=TAG_BYTES_MAX).contains(&tag.len())
                    && !tag.starts_with(['.', '-'])
                    && tag
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
                match is_valid {
                    true => Ok(tag),
                    false => Err(Error::invalid(format!("{} is not a tag", quoted(tag)))),
                }
            }
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(name) | Self::Digest(name) => f.write_str(name),
        }
    }
}

/// A manifest or an index. `digest` is the digest of `bytes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub bytes: Vec<u8>,
    pub media_type: String,
    pub digest: String,
}

/// The client of one repository. Each thread uses a clone of its own, made after the first
/// manifest, so that all of them have the token.
#[derive(Clone)]
pub struct Client {
    session: Session,
}

impl Client {
    /// Creates a client. Does not connect yet.
    ///
    /// # Errors
    /// `invalid_argument` for malformed settings.
    pub fn new(settings: Settings, dial: Arc<dyn Dial>, cancel: Cancel) -> Result<Self> {
        let session = Session::new(settings, dial, cancel)?;
        Ok(Self { session })
    }

    /// Fetches a manifest or an index.
    ///
    /// # Errors
    /// `reference_not_found`, `registry_denied`, `registry_unreachable`, `registry_busy`,
    /// `registry_untrusted`, `registry_invalid` (a wrong digest, media type or size, a forbidden
    /// redirect), `unsupported` (Docker's first format), `timeout`, `cancelled`.
    pub fn manifest(&mut self, selector: &Selector) -> Result<Manifest> {
        let repository = self.session.settings().repository.clone();
        self.fetch_manifest(selector)
            .map_err(|e| e.context(format!("fetch manifest {selector} of {repository}")))
    }

    fn fetch_manifest(&mut self, selector: &Selector) -> Result<Manifest> {
        let name = selector.check()?;
        let path = format!(
            "{}/manifests/{name}",
            self.session.settings().repository.path()
        );
        let reply = self.session.get(&Wanted {
            path,
            accept: ACCEPT_MANIFEST,
            from: None,
        })?;
        let reply = self.expect_ok(reply)?;
        let media_type = check_media_type(reply.media_type())?;
        let promised = reply.named_header(CONTENT_DIGEST).map(str::to_owned);
        let bytes = reply.read_all(self.session.limits().manifest_bytes)?;
        let digest = digest_of(&bytes);
        if let Selector::Digest(wanted) = selector {
            same_digest(wanted, &digest)?;
        }
        // A digest of another algorithm is not compared.
        if let Some(promised) = promised.filter(|promised| promised.starts_with("sha256:")) {
            same_digest(&promised, &digest)?;
        }
        Ok(Manifest {
            bytes,
            media_type,
            digest,
        })
    }

    /// Opens a blob. The reader ends after exactly `size` bytes, or fails. It does not check the
    /// digest: the reader of a layer does that while it reads.
    ///
    /// # Errors
    /// Those of [`Client::manifest`].
    pub fn blob(&self, digest: &str, size: u64, from: u64) -> Result<Blob> {
        check_digest(digest)?;
        Blob::open(self.session.clone(), digest, size, from)
    }

    /// Reads a whole blob of at most `max` bytes, such as a configuration, and checks its digest.
    ///
    /// # Errors
    /// Those of [`Client::manifest`].
    #[cfg(test)]
    #[cfg(test)]
    pub fn blob_bytes(&self, digest: &str, size: u64, max: u64) -> Result<Vec<u8>> {
        if size > max {
            return Err(Error::new(
                Kind::RegistryInvalid,
                format!("blob {digest} has {size} bytes, more than {max}"),
            ));
        }
        use std::io::Read;
        let mut bytes = Vec::new();
        self.blob(digest, size, 0)?
            .read_to_end(&mut bytes)
            .map_err(super::blob::error_of)?;
        same_digest(digest, &digest_of(&bytes)).map_err(|e| e.context("fetch a blob"))?;
        Ok(bytes)
    }

    fn expect_ok(&self, reply: Reply) -> Result<Reply> {
        match reply.status {
            200 => Ok(reply),
            _ => Err(self.session.refusal(reply)),
        }
    }
}

fn check_media_type(media_type: Option<String>) -> Result<String> {
    let invalid = |why: String| Err(Error::new(Kind::RegistryInvalid, why));
    match media_type {
        Some(known) if MANIFEST_TYPES.contains(&known.as_str()) => Ok(known),
        Some(old) if old.starts_with(OLD_TYPE_PREFIX) => Err(Error::new(
            Kind::Unsupported,
            "the image has Docker's first format, which has no digests of its layers",
        )
        .hint("push the image again with a current docker")),
        Some(other) => invalid(format!(
            "the reply is not a manifest, but {}",
            quoted(&other)
        )),
        None => invalid("the reply has no media type".into()),
    }
}

fn check_digest(digest: &str) -> Result<()> {
    let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    let is_valid = digest
        .strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(is_hex));
    match is_valid {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "{} is not a sha256 digest",
            quoted(digest)
        ))),
    }
}

fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(&Sha256::digest(bytes)))
}

fn same_digest(wanted: &str, found: &str) -> Result<()> {
    match wanted == found {
        true => Ok(()),
        false => Err(Error::new(
            Kind::RegistryInvalid,
            format!("the bytes have the digest {found}, not {}", quoted(wanted)),
        )),
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn accept_names_all_types() {
        assert_eq!(ACCEPT_MANIFEST, MANIFEST_TYPES.join(", "));
    }

    #[test]
    fn digests_and_tags_are_strict() {
        let hex = "0123456789abcdef".repeat(4);
        assert!(check_digest(&format!("sha256:{hex}")).is_ok());
        for digest in [
            hex.clone(),
            format!("sha256:{}", hex.to_uppercase()),
            format!("sha256:{hex}0"),
            format!("sha512:{hex}"),
            format!("sha256:../{}", &hex[3..]),
        ] {
            assert!(check_digest(&digest).is_err(), "{digest}");
        }
        for tag in ["", ".a", "-a", "a/b", "a?b", "a b", "\n", &"a".repeat(129)] {
            assert!(Selector::Tag(tag.to_owned()).check().is_err(), "{tag}");
        }
        assert!(Selector::Tag("v1.2_3-x".into()).check().is_ok());
    }
}
