//! Pulls images from registries and archives.
//!
//! Registries and layers are hostile, so a helper process without privileges talks to the registry,
//! unpacks the layers and writes the file system. It cannot open files, so it requests each one
//! from the daemon and receives a descriptor.
//!
//! ```text
//! daemon: deadlines, cancel, cache, publish      helper (no privileges, confined)     registry
//!   session ── channel: typed messages, files ── helper: fetch, oci ── HTTPS ──────────────┘
//! ```
//!
//! - [`session`] is the daemon's side. It hands out files, and does not trust the helper: a layer
//!   enters the cache only if the daemon itself has computed its digest.
//! - [`helper`], [`link`], [`report`], [`resume`] and [`work`] are the helper's side.
//! - [`protocol`] and [`job`] define the messages between the two.
//! - [`cache`] keeps unpacked layers for later pulls, and [`partial`] keeps the part of a layer
//!   that an interrupted pull has received. [`resume`] continues from that part.

mod cache;
pub(crate) mod helper;
mod job;
mod link;
mod partial;
mod protocol;
mod report;
mod resume;
mod session;
#[cfg(test)]
pub(crate) mod tests;
mod work;

pub(crate) use cache::Layers;
pub(in crate::image) use cache::digest as digest_of;
pub(in crate::image) use protocol::{Failure, decode, encode};
pub(crate) use protocol::{Found, Progress};

use super::fetch::{Proxies, Repository, Selector, Settings, TokenServer};
use super::fsck;
use super::oci::limits::UNPACKED_BYTES_MAX;
use super::oci::{Digest, Platform, Reference};
use super::registry::{ImageDetails, Images, Pulled, ROOTFS};
use super::{DiskUse, ImageInfo};
use crate::api::image::ArchiveFormat;
use crate::api::registry::{Credential, Secret};
use crate::config::Registry;
use crate::error::{Error, Kind, Result};
use crate::host::{Commands, Credentials};
use crate::ids::ImageRef;
use crate::locks::Cancel;
use helper::FILE_BYTES_MAX;
use job::{Job, JobSource, Outcome};
use session::Session;
use std::fs::{File, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The files in which distributions keep the certificates of the authorities that they trust. The
/// first file that exists is used, as OpenSSL of Debian, Red Hat, SUSE and Alpine does.
const AUTHORITIES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// The size limit of a file with certificates.
const AUTHORITIES_BYTES_MAX: u64 = 2 << 20;

/// The source of an image.
pub(crate) enum Source {
    Registry {
        reference: String,
        credential: Credential,
    },
    Archive {
        format: Option<ArchiveFormat>,
        /// Chooses one of several images.
        reference: Option<String>,
        stream: OwnedFd,
    },
}

pub(crate) struct PullSpec<'a> {
    pub source: Source,
    pub platform: Option<String>,
    /// The user to whom the image belongs.
    pub owner_uid: u32,
    /// True if no other user may use it.
    pub private: bool,
    /// The uid and gid of the helper, if the daemon is root.
    pub helper: Option<Credentials>,
    pub config: &'a Registry,
    /// The limit of the space that the image may take.
    pub bytes_max: u64,
}

/// The observer's decision about an image that was found.
#[derive(Debug)]
pub(crate) enum Decision {
    /// Publish it under this name, which is free.
    Add(ImageRef),
    /// Replace the image of this name.
    Replace {
        name: ImageRef,
        /// True if all users may use the new image because they could use the old one.
        is_shared: bool,
    },
    /// Publish nothing, because the same image already exists.
    Present(Box<ImageInfo>),
}

/// Follows a pull.
pub(crate) trait Observer {
    /// Called once, when the image is known. An error ends the pull.
    fn found(&mut self, found: &Found) -> Result<Decision>;
    /// Called right before an image is replaced. Checks again that nothing uses it. While the
    /// result lives, nothing can begin to use it.
    fn begin_replace(&mut self, name: &ImageRef) -> Result<Box<dyn std::any::Any>>;
    /// Called right before an image with these files is published. An error ends the pull.
    fn begin_publish(&mut self, files: DiskUse) -> Result<()>;
    fn progress(&mut self, progress: Progress);
}

/// Pulls an image and publishes it.
///
/// # Errors
/// Those of the registry client (`registry_denied`, `registry_unreachable` and others),
/// `invalid_image`, `unsupported`, `exhausted`, `disk_full`, `cancelled`, and those of the
/// observer.
pub(crate) fn pull(
    images: &Images,
    layers: &Layers,
    commands: &dyn Commands,
    spec: PullSpec<'_>,
    cancel: &Cancel,
    observer: &mut dyn Observer,
) -> Result<ImageInfo> {
    let source = describe(&spec.source);
    let name = own_name(&spec.source)?;
    let staging = images.stage_pull()?;
    let out = staging.path().join("out");
    let (rootfs, image) = create(&out, spec.helper)
        .map_err(|e| Error::io(format!("create a file in {}", out.display()), e))?;
    let (job, stream) = job(spec.source, spec.platform, spec.config, spec.bytes_max)?;
    let job = serde_json::to_vec(&job)
        .map_err(|e| Error::io("write the job", std::io::Error::from(e)))?;
    let mut deciding = Deciding {
        name,
        observer,
        decision: None,
    };
    let mut session = Session {
        layers,
        uid: spec.owner_uid,
        owner: spec.helper,
        job: &job,
        stream,
        image: &image,
    };
    let result = session.run(helper::NAME, cancel, &mut deciding)?;
    let mut private = spec.private;
    let (digest, name, replaces) = match deciding.decision {
        Some((_, Decision::Present(present))) => return Ok(*present),
        Some((digest, Decision::Add(name))) => (digest, name, false),
        Some((digest, Decision::Replace { name, is_shared })) => {
            private &= !is_shared;
            (digest, name, true)
        }
        None => return Err(Error::internal("the helper has found no image")),
    };
    let outcome: Outcome = result
        .as_deref()
        .and_then(protocol::decode)
        .and_then(Outcome::checked)
        .ok_or_else(|| Error::internal("the image helper sent a malformed result"))?;
    check_size(&image, spec.bytes_max)?;
    drop(image);
    fsck::check(commands, &rootfs, spec.helper, cancel)?;
    // No VM may be created from the old image until the new one has replaced it.
    let _replaced = if replaces {
        Some(deciding.observer.begin_replace(&name)?)
    } else {
        None
    };
    let files = DiskUse::of_directory(&out)?;
    deciding.observer.begin_publish(files)?;
    images.publish_pulled(
        &out,
        Pulled {
            name,
            digest,
            source,
            owner_uid: spec.owner_uid,
            private,
            config: outcome.config,
            details: ImageDetails {
                layers: outcome.layers,
                history: outcome.history,
            },
            os: outcome.os.unwrap_or_else(|| "unknown".to_owned()),
        },
        replaces,
    )
}

/// Creates the image's directory and the file of its root file system. The helper's uid must be
/// able to read both, whatever the umask is, and no other user may.
fn create(out: &Path, helper: Option<Credentials>) -> std::io::Result<(PathBuf, File)> {
    crate::locks::may_block("file access");
    std::fs::create_dir(out)?;
    let gid = helper.map(|helper| helper.gid);
    std::os::unix::fs::chown(out, None, gid)?;
    std::fs::set_permissions(out, Permissions::from_mode(0o710))?;
    let rootfs = out.join(ROOTFS);
    let mut options = File::options();
    let image = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(&rootfs)?;
    image.set_permissions(Permissions::from_mode(0o644))?;
    Ok((rootfs, image))
}

/// Remembers the observer's decision.
struct Deciding<'a> {
    /// The name of an image from a registry. It does not come from the helper, which a registry may
    /// have taken over.
    name: Option<String>,
    observer: &'a mut dyn Observer,
    /// The image's digest and what to do with it.
    decision: Option<(String, Decision)>,
}

impl session::Observer for Deciding<'_> {
    fn found(&mut self, mut found: Found) -> Result<bool> {
        if self.name.is_some() {
            found.name.clone_from(&self.name);
        }
        if self.decision.is_some() {
            return Err(Error::internal("the helper has found two images"));
        }
        if found.digest.parse::<Digest>().is_err() {
            return Err(Error::internal("the helper has found no digest"));
        }
        let decision = self.observer.found(&found)?;
        let is_wanted = !matches!(decision, Decision::Present(_));
        self.decision = Some((found.digest, decision));
        Ok(is_wanted)
    }

    fn progress(&mut self, progress: Progress) {
        self.observer.progress(progress);
    }
}

/// Returns the name of an image in a registry, or None for an archive, which may contain a name.
fn own_name(source: &Source) -> Result<Option<String>> {
    match source {
        Source::Registry { reference, .. } => {
            let reference: Reference = reference.parse()?;
            Ok(Some(reference.familiar()))
        }
        Source::Archive { .. } => Ok(None),
    }
}

fn describe(source: &Source) -> String {
    match source {
        Source::Registry { reference, .. } => reference.clone(),
        Source::Archive {
            reference: Some(reference),
            ..
        } => format!("archive, {reference}"),
        Source::Archive {
            reference: None, ..
        } => "archive".to_owned(),
    }
}

fn job(
    source: Source,
    platform: Option<String>,
    config: &Registry,
    bytes_max: u64,
) -> Result<(Job, Option<OwnedFd>)> {
    let platform: Platform = platform.map_or(Ok(Platform::default()), |text| text.parse())?;
    let (source, stream) = match source {
        Source::Registry {
            reference,
            credential,
        } => {
            let reference: Reference = reference.parse()?;
            let selector = match (reference.digest(), reference.tag()) {
                (Some(digest), _) => Selector::Digest(digest.to_string()),
                (None, Some(tag)) => Selector::Tag(tag.to_owned()),
                (None, None) => return Err(Error::internal("a reference has no tag")),
            };
            let source = JobSource::Registry {
                settings: Box::new(settings(&reference, credential, config)?),
                selector,
                name: reference.familiar(),
            };
            (source, None)
        }
        Source::Archive {
            format,
            reference,
            stream,
        } => (JobSource::Archive { format, reference }, Some(stream)),
    };
    let job = Job {
        source,
        platform: platform.to_string(),
        bytes_max: bytes_max.min(UNPACKED_BYTES_MAX),
    };
    Ok((job, stream))
}

fn settings(reference: &Reference, credential: Credential, config: &Registry) -> Result<Settings> {
    let repository = Repository {
        registry: reference.domain().to_owned(),
        name: reference.path().to_owned(),
    };
    let servers = config.token_servers()?.into_iter();
    let token_servers = servers.map(|server| TokenServer {
        registry: server.registry,
        host: server.host,
    });
    Ok(Settings {
        credential,
        authorities: authorities(config)?,
        proxies: proxies(config),
        insecure: config.insecure.clone(),
        token_servers: token_servers.collect(),
        ..Settings::new(repository)
    })
}

/// Returns the certificates of the host's authorities and of the configured ones.
fn authorities(config: &Registry) -> Result<String> {
    crate::locks::may_block("file access");
    let host = AUTHORITIES.iter().map(Path::new).find(|path| path.exists());
    let configured = config.authorities.iter().map(PathBuf::as_path);
    let mut all = String::new();
    for path in host.into_iter().chain(configured) {
        let read = File::open(path)
            .and_then(|file| crate::host::command::read_bounded(file, AUTHORITIES_BYTES_MAX));
        let bytes =
            read.map_err(|e| Error::io(format!("read the certificates in {}", path.display()), e))?;
        all.push_str(&String::from_utf8_lossy(&bytes));
        all.push('\n');
    }
    Ok(all)
}

/// Returns the configured proxies, or those of the daemon's environment.
fn proxies(config: &Registry) -> Proxies {
    let environment = Proxies::from_env(&|name| std::env::var(name).ok());
    let configured = |setting: &str| (!setting.is_empty()).then(|| Secret::new(setting));
    Proxies {
        https: configured(&config.https_proxy).or(environment.https),
        http: configured(&config.http_proxy).or(environment.http),
        no_proxy: if config.no_proxy.is_empty() {
            environment.no_proxy
        } else {
            config.no_proxy.clone()
        },
    }
}

/// Checks the size of the image's file, because the helper may have written anything to it.
fn check_size(image: &File, bytes_max: u64) -> Result<()> {
    let stat = image
        .metadata()
        .map_err(|e| Error::io("read the size of the image", e))?;
    let allocated = stat.blocks() * 512;
    if allocated <= bytes_max && stat.len() <= FILE_BYTES_MAX {
        return Ok(());
    }
    let text = format!("the image takes {allocated} bytes, at most {bytes_max} are allowed");
    Err(Error::new(Kind::Exhausted, text).hint("delete an image: fcctl image rm NAME"))
}
