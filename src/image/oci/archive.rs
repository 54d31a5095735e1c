//! An archive of images that arrives as one stream: an `oci-archive`, or a `docker-archive` as
//! `docker save` writes it.
//!
//! A stream cannot seek and its parts come in any order, so it is spooled to one temporary file,
//! and the positions of its files are kept in memory. The archive may be compressed as a whole. Its
//! content is verified when it is used: by the digests in the manifest, or in a docker-archive,
//! whose manifest has no digests, by those in the configuration.

use super::budget::Budget;
use super::decompress::decoder;
use super::digest::{Digest, Hashing};
use super::entry::{EntryKind, clean_path};
use super::errors::{as_io, bad, check_cancel, read_error, shown};
use super::limits::{ARCHIVE_FILES_MAX, DOCUMENT_BYTES_MAX, LAYERS_MAX};
use super::manifest::{
    Blobs, DOCKER_LAYER, Descriptor, Image, find_in_layout, image_of, parse_json, resolve, several,
    whole_name,
};
use super::platform::Platform;
use super::reference::Reference;
use super::spool::{Portion, Spooling};
use super::tar_reader::TarReader;
use crate::api::image::ArchiveFormat;
use crate::error::{Error, Kind, Result};
use crate::host::text;
use crate::locks::Cancel;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{BufReader, Read};

const OCI_LAYOUT: &str = "oci-layout";
const OCI_INDEX: &str = "index.json";
const DOCKER_MANIFEST: &str = "manifest.json";
/// The maximum number of links from one file of a docker-archive to another. Old versions of docker
/// store a layer once and link to it.
const LINKS_MAX: usize = 8;
const BUFFER_BYTES: usize = 256 << 10;

/// The image to find in an archive.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The format, or `None` to detect it from the archive's files.
    pub format: Option<ArchiveFormat>,
    /// A tag of an oci-archive, or a reference of a docker-archive. It may be `None` if there is
    /// only one image.
    pub name: Option<String>,
    pub platform: Platform,
}

/// A spooled archive.
pub struct Archive {
    spool: File,
    files: BTreeMap<Box<str>, Position>,
    /// The targets of symbolic and hard links, as paths from the root.
    links: BTreeMap<Box<str>, Box<str>>,
    /// The layers of a docker-archive.
    layers: HashMap<Digest, Position>,
}

#[derive(Clone, Copy, Debug)]
struct Position {
    offset: u64,
    bytes: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl Archive {
    /// Reads an archive of at most `bytes_max` uncompressed bytes to its end, and writes it to the
    /// empty file `spool`. `progress` is called with the bytes that were read since the last call.
    pub fn spool(
        stream: impl Read,
        spool: File,
        bytes_max: u64,
        progress: &dyn Fn(u64),
        cancel: &Cancel,
    ) -> Result<Self> {
        let budget = Budget::new(bytes_max);
        let watched = Watched {
            inner: stream,
            progress,
            cancel,
        };
        let inflated = decoder(BufReader::with_capacity(BUFFER_BYTES, watched));
        let spooling = Spooling {
            inner: inflated.map_err(|e| read_error("read the archive", e))?,
            spool: &spool,
            budget: &budget,
        };
        let buffered = BufReader::with_capacity(BUFFER_BYTES, spooling);
        let (mut files, mut links) = (BTreeMap::new(), BTreeMap::new());
        let mut reader = TarReader::new(buffered, &budget);
        while let Some(entry) = reader.next()? {
            if files.len() + links.len() >= ARCHIVE_FILES_MAX {
                return Err(bad(format!(
                    "the archive has more than {ARCHIVE_FILES_MAX} files"
                )));
            }
            match entry.kind {
                EntryKind::File { offset, bytes } => {
                    files.insert(entry.path, Position { offset, bytes });
                }
                EntryKind::HardLink { target } => {
                    links.insert(entry.path, target);
                }
                EntryKind::Symlink { target } => {
                    if let Some(target) = beside(&entry.path, &target) {
                        links.insert(entry.path, target);
                    }
                }
                _ => {}
            }
        }
        reader.finish()?;
        Ok(Self {
            spool,
            files,
            links,
            layers: HashMap::new(),
        })
    }

    /// Finds an image. The caller passes it to [`flatten`](super::flatten()) with this archive as
    /// the source of its blobs. `progress` is called with the bytes that were read since the last
    /// call, because the layers of a docker-archive are read to compute their digests.
    pub fn image(
        &mut self,
        wanted: &Wanted,
        progress: &dyn Fn(u64),
        cancel: &Cancel,
    ) -> Result<Image> {
        let is_oci = self.files.contains_key(OCI_LAYOUT) && self.files.contains_key(OCI_INDEX);
        let is_docker = self.files.contains_key(DOCKER_MANIFEST);
        match wanted.format {
            Some(ArchiveFormat::Docker) if is_docker => self.docker_image(wanted, progress, cancel),
            Some(ArchiveFormat::Oci) | None if is_oci => {
                let index = self.document(OCI_INDEX)?;
                let root = find_in_layout(&index, wanted.name.as_deref(), &wanted.platform)?;
                let image = resolve(&root.blob, &wanted.platform, self)?;
                let name = root.name.as_deref().and_then(whole_name);
                Ok(Image { name, ..image })
            }
            None if is_docker => self.docker_image(wanted, progress, cancel),
            format => {
                let what = match format {
                    Some(ArchiveFormat::Docker) => "a docker-archive: it has no manifest.json",
                    Some(ArchiveFormat::Oci) => "an oci-archive: it has no index.json",
                    None => "an archive of images: it has neither index.json nor manifest.json",
                };
                let error = bad(format!("this is not {what}"));
                Err(error.hint("docker save IMAGE writes such an archive"))
            }
        }
    }

    fn docker_image(
        &mut self,
        wanted: &Wanted,
        progress: &dyn Fn(u64),
        cancel: &Cancel,
    ) -> Result<Image> {
        let images: Vec<DockerImage> =
            parse_json(DOCKER_MANIFEST, &self.document(DOCKER_MANIFEST)?)?;
        let image = choose(images, wanted.name.as_deref())?;
        let config = self.document(&image.config)?;
        // If an image has several tags, its name is the requested one.
        let tags = wanted.name.iter().chain(image.repo_tags.iter().flatten());
        let name = tags.filter_map(|tag| tag.parse::<Reference>().ok()).next();
        let name = name.map(|name| name.familiar());
        let paths = image.layers.unwrap_or_default();
        if paths.len() > LAYERS_MAX {
            return Err(bad(format!(
                "the image has {} layers, at most {LAYERS_MAX} are allowed",
                paths.len()
            )));
        }
        let mut layers = Vec::new();
        for path in &paths {
            let position = self.find(path)?;
            let digest = digest_of(Watched {
                inner: BufReader::with_capacity(BUFFER_BYTES, self.portion(position)),
                progress,
                cancel,
            })?;
            self.layers.insert(digest, position);
            layers.push(Descriptor {
                media_type: DOCKER_LAYER.to_owned(),
                digest,
                size: position.bytes,
            });
        }
        // Docker also calls the digest of the configuration the image's id.
        let image = image_of(Digest::of(&config), layers, &config, &wanted.platform)?;
        Ok(Image { name, ..image })
    }

    /// Finds a file and follows links.
    fn find(&self, path: &str) -> Result<Position> {
        let mut at = clean_path(path.as_bytes())?;
        for _ in 0..=LINKS_MAX {
            if let Some(position) = self.files.get(&at) {
                return Ok(*position);
            }
            match self.links.get(&at) {
                Some(target) => at = target.clone(),
                None => break,
            }
        }
        Err(bad(format!(
            "the archive does not have {}",
            shown(path.as_bytes())
        )))
    }

    fn document(&self, path: &str) -> Result<Vec<u8>> {
        let position = self.find(path)?;
        if position.bytes > DOCUMENT_BYTES_MAX {
            return Err(bad(format!(
                "{} in the archive has more than {DOCUMENT_BYTES_MAX} bytes",
                shown(path.as_bytes())
            )));
        }
        let mut bytes = Vec::new();
        let read = self.portion(position).read_to_end(&mut bytes);
        read.map_err(|e| read_error("read the archive", e))?;
        Ok(bytes)
    }

    fn portion(&self, position: Position) -> Portion<'_> {
        Portion {
            file: &self.spool,
            at: position.offset,
            left: position.bytes,
        }
    }
}

fn digest_of(reader: impl Read) -> Result<Digest> {
    let mut hashing = Hashing::new(reader);
    let read = std::io::copy(&mut hashing, &mut std::io::sink());
    read.map_err(|e| read_error("read the archive", e))?;
    Ok(hashing.digest())
}

/// Returns the path that a relative link refers to, or `None` if it is outside of the archive.
fn beside(path: &str, target: &str) -> Option<Box<str>> {
    let mut parts: Vec<&str> = path.split('/').collect();
    parts.pop();
    for part in target
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
    {
        if part == ".." {
            parts.pop()?;
        } else {
            parts.push(part);
        }
    }
    clean_path(parts.join("/").as_bytes()).ok()
}

fn choose(mut images: Vec<DockerImage>, name: Option<&str>) -> Result<DockerImage> {
    let Some(name) = name else {
        // Some tools write an entry for each tag of an image.
        let mut seen = HashSet::new();
        images.retain(|image| seen.insert((image.config.clone(), image.layers.clone())));
        return match images.len() {
            0 => Err(bad("the archive has no image")),
            1 => Ok(images.swap_remove(0)),
            count => {
                let names = images.into_iter().flat_map(|image| image.repo_tags);
                Err(several(count, names.flatten(), "docker-archive"))
            }
        };
    };
    let wanted: Reference = name.parse()?;
    let is_wanted = |tag: &String| tag.parse::<Reference>().is_ok_and(|tag| tag == wanted);
    let found = images.iter().position(|image| {
        let mut tags = image.repo_tags.iter().flatten();
        tags.any(is_wanted)
    });
    found.map(|at| images.swap_remove(at)).ok_or_else(|| {
        let message = format!("the archive has no image named {}", text::quoted(name));
        Error::new(Kind::ImageNotFound, message)
    })
}

impl Blobs for Archive {
    fn open(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send + '_>> {
        let position = match self.layers.get(&blob.digest) {
            Some(position) => *position,
            None => self.find(&format!("blobs/sha256/{}", blob.digest.hex()))?,
        };
        Ok(Box::new(self.portion(position)))
    }
}

/// A reader that reports its progress, and fails when the pull is cancelled.
struct Watched<'a, R> {
    inner: R,
    progress: &'a dyn Fn(u64),
    cancel: &'a Cancel,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        check_cancel(self.cancel).map_err(as_io)?;
        let n = self.inner.read(buffer)?;
        (self.progress)(n as u64);
        Ok(n)
    }
}

#[cfg(test)]
#[path = "archive_tests.rs"]
mod tests;
