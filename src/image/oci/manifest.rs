//! Indexes, manifests and configurations of images: OCI's and those of Docker's schema 2.
//!
//! [`resolve`] follows an index to the manifest of one platform and reads its configuration. All
//! documents are hostile. They are verified against the digest that refers to them before they are
//! parsed, their sizes and counts are limited, and their content is only used as data. `urls` in a
//! descriptor are ignored, because layers come only from the registry.

use super::digest::{Digest, Hashing};
use super::errors::{bad, read_error};
use super::limits::{
    DOCUMENT_BYTES_MAX, HISTORY_MAX, INDEX_DEPTH_MAX, INDEX_ENTRIES_MAX, LAYERS_MAX,
};
use super::platform::{Claimed, Platform};
use super::reference::Reference;
use crate::api::image::{ImageConfig, ImageHistory};
use crate::error::{Error, Kind, Result};
use crate::host::text;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::io::Read;

/// The media types of indexes and manifests, for the `Accept` header of a request.
pub const ACCEPTED: &[&str] = &[OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST];

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// The prefixes of the media types of layers. The compression is detected from the first bytes, as
/// docker does it, because media types are often wrong.
const LAYERS: &[&str] = &[
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];
/// The media type for layers of archives that do not have one.
pub(super) const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
/// The annotation that names an image in an archive or a layout.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation that containerd and Docker add, with the full name.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// How many names of images an error shows.
const NAMES_SHOWN_MAX: usize = 8;

/// Limits of the size of a string in the configuration, and of the number of strings in a list.
const STRING_BYTES_MAX: usize = 128 << 10;
const STRINGS_MAX: usize = 4096;
/// Limit of the configuration as JSON. The answer of `image.show` contains it, and has at most 1
/// MiB.
const CONFIG_JSON_BYTES_MAX: usize = 256 << 10;

/// Refers to a blob by its digest.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
}

impl Descriptor {
    /// True if a registry serves this blob as a manifest.
    pub fn is_manifest(&self) -> bool {
        ACCEPTED.contains(&self.media_type.as_str())
    }
}

/// The source of blobs: a registry, or an archive that was spooled.
pub trait Blobs: Sync {
    /// Opens a blob. The reader may return any bytes: the caller verifies size and digest.
    fn open(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send + '_>>;

    /// Opens a blob again whose bytes turned out to be wrong. Returns None if no part of them came
    /// from an earlier pull, because they would then be the same again.
    fn open_again(&self, _blob: &Descriptor) -> Result<Option<Box<dyn Read + Send + '_>>> {
        Ok(None)
    }
}

/// A layer of an image.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// The blob, which may be compressed.
    pub blob: Descriptor,
    /// The digest of the uncompressed tar.
    pub diff_id: Digest,
}

/// An image that was found, with the content of its manifest and configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// The digest of the manifest.
    pub digest: Digest,
    pub config: ImageConfig,
    pub history: Vec<ImageHistory>,
    /// The layers, the lowest first.
    pub layers: Vec<Layer>,
    /// The name of the image in its archive, if it has one.
    pub name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<Vec<IndexEntry>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct IndexEntry {
    #[serde(flatten)]
    blob: Descriptor,
    platform: Option<Claimed>,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, serde_json::Value>,
}

impl IndexEntry {
    fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key)?.as_str()
    }

    fn is_named(&self, name: &str) -> bool {
        [REF_NAME, CONTAINERD_NAME]
            .iter()
            .any(|key| self.annotation(key) == Some(name))
    }

    /// True if docker would resolve a reference to this entry.
    fn is_meant_by(&self, reference: &Reference) -> bool {
        let name = self.annotation(REF_NAME).filter(|name| !is_tag(name));
        let names = [self.annotation(CONTAINERD_NAME), name];
        let is_meant = |name: &str| {
            name.parse::<Reference>()
                .is_ok_and(|name| name == *reference)
        };
        names.into_iter().flatten().any(is_meant)
    }
}

/// True if the name in an archive is only a tag.
fn is_tag(name: &str) -> bool {
    !name.contains(['/', ':'])
}

/// Returns the name of an image in its shortest form, or None if it is only a tag.
pub(super) fn whole_name(name: &str) -> Option<String> {
    let parsed: Option<Reference> = name.parse().ok();
    parsed.filter(|_| !is_tag(name)).map(|name| name.familiar())
}

/// An image of a layout or an archive.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Named {
    pub(super) blob: Descriptor,
    /// The whole name of the image, or its tag.
    pub(super) name: Option<String>,
}

impl Named {
    fn of(entry: IndexEntry) -> Self {
        let name = |key| entry.annotation(key).map(str::to_owned);
        Self {
            name: name(CONTAINERD_NAME).or_else(|| name(REF_NAME)),
            blob: entry.blob,
        }
    }
}

#[derive(Debug)]
enum Parsed {
    Index(Vec<IndexEntry>),
    Manifest(Manifest),
}

impl std::fmt::Debug for IndexEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.blob)
    }
}

#[derive(Debug)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

pub(super) fn parse_json<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| bad(format!("read the {what}")).with_source(e))
}

/// Parses an index or a manifest. A document that could be read as both is refused, regardless of
/// its media type (CVE-2021-41190).
fn parse(bytes: &[u8]) -> Result<Parsed> {
    let document: Document = parse_json("manifest", bytes)?;
    if document.schema_version == Some(1) {
        return Err(Error::new(
            Kind::Unsupported,
            "the image has a manifest of Docker's schema 1, which is obsolete",
        )
        .hint("push the image again with a current docker"));
    }
    let media_type = document.media_type.as_deref();
    match (document.manifests, document.config, document.layers) {
        (Some(manifests), None, None) => {
            if media_type.is_some_and(|t| t != OCI_INDEX && t != DOCKER_LIST) {
                return Err(bad("the mediaType of the index is that of something else"));
            }
            if manifests.len() > INDEX_ENTRIES_MAX {
                return Err(bad(format!(
                    "the index has {} entries, at most {INDEX_ENTRIES_MAX} are allowed",
                    manifests.len()
                )));
            }
            Ok(Parsed::Index(manifests))
        }
        (None, Some(config), Some(layers)) => {
            if media_type.is_some_and(|t| t != OCI_MANIFEST && t != DOCKER_MANIFEST) {
                return Err(bad(
                    "the mediaType of the manifest is that of something else",
                ));
            }
            check_parts(&config, &layers)?;
            Ok(Parsed::Manifest(Manifest { config, layers }))
        }
        _ => Err(bad("the document is neither an index nor a manifest")),
    }
}

fn check_parts(config: &Descriptor, layers: &[Descriptor]) -> Result<()> {
    if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
        let shown = text::quoted(&config.media_type);
        let message = format!("this is not an image that can run: its configuration is a {shown}");
        return Err(Error::new(Kind::Unsupported, message));
    }
    if layers.len() > LAYERS_MAX {
        return Err(bad(format!(
            "the image has {} layers, at most {LAYERS_MAX} are allowed",
            layers.len()
        )));
    }
    let mut sizes = layers.iter().map(|layer| layer.size);
    let all = sizes.try_fold(0_u64, u64::checked_add);
    if all.is_none() {
        return Err(bad("the layers of the image are larger than any disk"));
    }
    for layer in layers {
        let known = LAYERS.iter().any(|prefix| {
            let rest = layer.media_type.strip_prefix(prefix);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', '.']))
        });
        if !known {
            let shown = text::quoted(&layer.media_type);
            let message = format!("layer {} is not a tar: it is a {shown}", layer.digest);
            return Err(Error::new(Kind::Unsupported, message));
        }
    }
    Ok(())
}

/// Reads a whole document, and verifies its size and digest.
fn fetch(what: &str, blob: &Descriptor, blobs: &dyn Blobs) -> Result<Vec<u8>> {
    crate::locks::may_block("file access");
    if blob.size > DOCUMENT_BYTES_MAX {
        return Err(bad(format!(
            "the {what} {} has {} bytes, at most {DOCUMENT_BYTES_MAX} are allowed",
            blob.digest, blob.size
        )));
    }
    let reader = blobs.open(blob)?;
    let mut bytes = Vec::new();
    let mut hashing = Hashing::new(reader.take(blob.size + 1));
    let read = hashing.read_to_end(&mut bytes);
    read.map_err(|e| read_error(format!("read the {what} {}", blob.digest), e))?;
    if hashing.count() != blob.size {
        let than = if hashing.count() > blob.size {
            "more"
        } else {
            "fewer"
        };
        return Err(bad(format!(
            "the {what} {} has {than} than the {} bytes that it should have",
            blob.digest, blob.size
        )));
    }
    let digest = hashing.digest();
    if digest != blob.digest {
        return Err(bad(format!(
            "the {what} {} has another digest: {digest}",
            blob.digest
        )));
    }
    Ok(bytes)
}

/// Follows `root` to the manifest for the platform, and reads its configuration.
///
/// # Errors
/// `invalid_image` for malformed or lying documents; `unsupported` for other platforms and for what
/// is not an image; those of `blobs`.
pub fn resolve(root: &Descriptor, platform: &Platform, blobs: &dyn Blobs) -> Result<Image> {
    resolve_with(root, platform, |what, blob| fetch(what, blob, blobs))
}

/// Resolves with documents that `fetch` has already verified. Its first argument describes the
/// document, for error messages.
pub(super) fn resolve_with(
    root: &Descriptor,
    platform: &Platform,
    mut fetch: impl FnMut(&str, &Descriptor) -> Result<Vec<u8>>,
) -> Result<Image> {
    let mut at = root.clone();
    // The depth is limited instead of looking for loops: a digest cannot refer to itself, but a
    // registry could serve an endless chain.
    for _ in 0..=INDEX_DEPTH_MAX {
        match parse(&fetch("manifest", &at)?)? {
            Parsed::Index(entries) => at = choose(entries, platform)?.blob,
            Parsed::Manifest(manifest) => {
                let config = fetch("configuration", &manifest.config)?;
                return image_of(at.digest, manifest.layers, &config, platform);
            }
        }
    }
    Err(bad(format!(
        "more than {INDEX_DEPTH_MAX} indexes refer to each other"
    )))
}

/// Returns the entry that suits the platform best, the first of several equal ones. An entry
/// without a platform fits if it is the only one, because archives of one image often omit it.
fn choose(mut entries: Vec<IndexEntry>, platform: &Platform) -> Result<IndexEntry> {
    let rank = |entry: &IndexEntry| entry.platform.as_ref()?.rank(platform);
    let only = entries.len() == 1 && entries[0].platform.is_none();
    let ranked = entries.iter().enumerate();
    let best = ranked
        .filter_map(|(at, entry)| Some((rank(entry)?, at)))
        .min();
    match if only {
        Some(0)
    } else {
        best.map(|(_, at)| at)
    } {
        Some(at) => Ok(entries.swap_remove(at)),
        None => {
            let mut offered: Vec<String> = entries
                .iter()
                .filter_map(|entry| entry.platform.as_ref())
                .map(Claimed::to_string)
                .filter(|platform| platform != "unknown/unknown")
                .take(16)
                .collect();
            offered.dedup();
            Err(wrong_platform(platform, &offered.join(", ")))
        }
    }
}

fn wrong_platform(wanted: &Platform, offered: &str) -> Error {
    let message = format!("the image is not for {wanted}");
    let error = Error::new(Kind::Unsupported, message);
    if offered.is_empty() {
        error
    } else {
        error.hint(format!("it is for {offered}: choose one with --platform"))
    }
}

/// Finds an image in the `index.json` of an archive or a layout: the one named `name`, else the
/// only one. Several entries are accepted without a name if their platforms tell them apart.
pub(super) fn find_in_layout(
    index: &[u8],
    name: Option<&str>,
    platform: &Platform,
) -> Result<Named> {
    let Parsed::Index(mut entries) = parse(index)? else {
        return Err(bad("index.json is not an index"));
    };
    if let Some(name) = name {
        let reference = name.parse::<Reference>().ok();
        let has_exact = entries.iter().any(|entry| entry.is_named(name));
        entries.retain(|entry| match &reference {
            _ if has_exact => entry.is_named(name),
            Some(reference) => entry.is_meant_by(reference),
            None => false,
        });
    }
    // An image has an entry for each of its tags.
    let mut seen = BTreeSet::new();
    entries.retain(|entry| seen.insert(entry.blob.digest));
    let all = entries.len();
    match (all, name) {
        (0, Some(name)) => {
            let shown = text::quoted(name);
            let message = format!("the archive has no image named {shown}");
            return Err(Error::new(Kind::ImageNotFound, message));
        }
        (0, None) => return Err(bad("the archive has no image")),
        (1, _) => return Ok(Named::of(entries.swap_remove(0))),
        _ => {}
    }
    if entries.iter().any(|entry| entry.platform.is_none()) {
        let names = entries.into_iter().map(|entry| Named::of(entry).name);
        return Err(several(all, names.flatten(), "oci-archive"));
    }
    choose(entries, platform).map(Named::of)
}

/// Returns the error for an archive from which the caller must choose an image.
pub(super) fn several(count: usize, names: impl Iterator<Item = String>, kind: &str) -> Error {
    let shown = |name: String| text::quoted(&whole_name(&name).unwrap_or(name));
    let names: Vec<String> = names.take(NAMES_SHOWN_MAX).map(shown).collect();
    let mut message = format!("the archive has {count} images");
    if !names.is_empty() {
        message += &format!(": {}", names.join(", "));
    }
    Error::invalid(message).hint(format!(
        "name one: fcctl image pull {kind}:FILE:NAME, where FILE may be /dev/stdin"
    ))
}

#[derive(Deserialize)]
struct Configuration {
    #[serde(flatten)]
    platform: Claimed,
    #[serde(default)]
    config: Option<Process>,
    rootfs: RootFs,
    #[serde(default)]
    history: Option<Vec<ImageHistory>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Process {
    user: Option<String>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    stop_signal: Option<String>,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Option<Vec<Digest>>,
}

/// Makes an image from the layers of its manifest and its configuration.
pub(super) fn image_of(
    digest: Digest,
    layers: Vec<Descriptor>,
    config: &[u8],
    platform: &Platform,
) -> Result<Image> {
    let configuration: Configuration = parse_json("configuration", config)?;
    let mut claimed = configuration.platform;
    // Most tools do not write the variant.
    if claimed.variant.as_deref().is_none_or(str::is_empty) {
        claimed.variant.clone_from(&platform.variant);
    }
    // Old tools left the fields empty. Then only the index determines the platform.
    let is_silent = claimed.os.is_empty() && claimed.architecture.is_empty();
    if !is_silent && !claimed.fits(platform) {
        return Err(wrong_platform(platform, &claimed.to_string()));
    }
    let diff_ids = configuration.rootfs.diff_ids.unwrap_or_default();
    if diff_ids.len() != layers.len() {
        return Err(bad(format!(
            "the manifest has {} layers, but the configuration has {}",
            layers.len(),
            diff_ids.len()
        )));
    }
    let layers = layers.into_iter().zip(diff_ids);
    let history = configuration.history.unwrap_or_default();
    if history.len() > HISTORY_MAX {
        return Err(bad(format!(
            "the image's history has more than {HISTORY_MAX} steps"
        )));
    }
    let process = configuration.config.unwrap_or_default();
    let config = ImageConfig {
        user: process.user.unwrap_or_default(),
        env: process.env.unwrap_or_default(),
        working_dir: process.working_dir.unwrap_or_default(),
        entrypoint: process.entrypoint.unwrap_or_default(),
        cmd: process.cmd.unwrap_or_default(),
        stop_signal: process.stop_signal.filter(|signal| !signal.is_empty()),
    };
    check_config(&config)?;
    Ok(Image {
        digest,
        config,
        history,
        layers: layers
            .map(|(blob, diff_id)| Layer { blob, diff_id })
            .collect(),
        name: None,
    })
}

/// Checks the sizes of a configuration's parts.
///
/// # Errors
/// `invalid_image`.
pub fn check_config(config: &ImageConfig) -> Result<()> {
    let lists = [&config.env, &config.entrypoint, &config.cmd];
    if lists.iter().any(|list| list.len() > STRINGS_MAX) {
        return Err(bad(format!(
            "a list in the configuration has more than {STRINGS_MAX} strings"
        )));
    }
    let single = [&config.user, &config.working_dir].into_iter();
    let mut all = single
        .chain(&config.stop_signal)
        .chain(lists.into_iter().flatten());
    if all.any(|text| text.len() > STRING_BYTES_MAX || text.contains('\0')) {
        return Err(bad(format!(
            "a string in the configuration has a null character or more than {STRING_BYTES_MAX} bytes"
        )));
    }
    let json = serde_json::to_vec(config).map_or(usize::MAX, |json| json.len());
    if json > CONFIG_JSON_BYTES_MAX {
        return Err(bad(format!(
            "the configuration has {json} bytes as JSON, at most {CONFIG_JSON_BYTES_MAX} are allowed"
        )));
    }
    Ok(())
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
