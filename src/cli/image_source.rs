//! The sources of `image pull`, in the notation of skopeo (containers-transports(5)). Files are
//! opened here, with the caller's rights; the daemon gets only their bytes.

use super::image_file::{self, Origin};
use super::pipes;
use super::values::{is_path, path_error};
use crate::api::image::{ArchiveFormat, MANIFEST_TYPES, PullSource};
use crate::error::{Error, Result};
use crate::host::shell::quote;
use crate::host::text::quoted;
use crate::locks::Cancel;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

/// The size limit of an index or a manifest in a layout directory.
const JSON_BYTES_MAX: u64 = 4 << 20;
/// The most blobs that are sent.
const BLOBS_MAX: usize = 4096;
const LAYOUT_HINT: &str = "a directory must be an OCI layout, such as skopeo copy writes";
const LAYOUT_FILE: &str = "oci-layout";
const INDEX_FILE: &str = "index.json";
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// An image on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A reference without `docker://`. It may also be the name of a file.
    Reference(String),
    /// A reference that was written after `docker://`.
    Registry(String),
    /// A path that cannot be a reference: an archive of either kind, or an OCI layout.
    Path(PathBuf),
    /// A file with an archive, and the image in it.
    Archive(ArchiveFormat, PathBuf, Option<String>),
    /// An archive on stdin.
    Stdin,
    /// An OCI layout directory, and the tag of the image in it.
    Layout(PathBuf, Option<String>),
}

impl std::str::FromStr for Source {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "-" {
            return Ok(Self::Stdin);
        }
        if let Some(reference) = text.strip_prefix("docker://") {
            return Ok(Self::Registry(reference.to_owned()));
        }
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, tag) = path_and_reference(rest)?;
            return Ok(Self::Layout(dir, tag));
        }
        for (prefix, format) in [
            ("oci-archive:", ArchiveFormat::Oci),
            ("docker-archive:", ArchiveFormat::Docker),
        ] {
            if let Some(rest) = text.strip_prefix(prefix) {
                let (file, reference) = path_and_reference(rest)?;
                return Ok(Self::Archive(format, file, reference));
            }
        }
        if let Some((transport, name)) = text.split_once(':') {
            refuse_transport(transport, name)?;
        }
        Ok(if is_path(text) {
            Self::Path(text.into())
        } else {
            Self::Reference(text.to_owned())
        })
    }
}

/// Refuses what skopeo reads but fcctl does not, and says how to convert it.
fn refuse_transport(transport: &str, name: &str) -> Result<()> {
    let name = quote(name);
    let hint = match transport {
        "docker-daemon" => format!("docker save {name} | fcctl image pull -"),
        "containers-storage" => format!("podman save {name} | fcctl image pull -"),
        "dir" | "tarball" => {
            format!("skopeo copy {transport}:{name} oci:DIR && fcctl image pull oci:DIR")
        }
        _ => return Ok(()),
    };
    Err(Error::invalid(format!("fcctl cannot read from {transport}")).hint(hint))
}

/// Splits `PATH[:REFERENCE]` at the first colon, as skopeo does.
fn path_and_reference(text: &str) -> Result<(PathBuf, Option<String>)> {
    let (path, reference) = match text.split_once(':') {
        Some((path, reference)) => (path, Some(reference.to_owned())),
        None => (text, None),
    };
    if path.is_empty() {
        return Err(Error::invalid(format!("{} has no path", quoted(text))));
    }
    Ok((path.into(), reference))
}

/// The data that is sent to the daemon through a pipe.
#[derive(Debug)]
pub(super) enum Content {
    /// An archive, and the file that it comes from. The origin is None for stdin.
    File(File, Option<Origin>),
    Layout(Layout),
}

impl Source {
    /// Opens what the caller named. Returns the source for the request, and the data to send with
    /// it.
    pub(super) fn open(self, stdin: &File) -> Result<(PullSource, Option<Content>)> {
        let archive = |format, reference, content| {
            Ok((PullSource::Archive { format, reference }, Some(content)))
        };
        match self {
            Self::Reference(reference) => {
                image_file::refuse_name_of_file(&reference)?;
                Ok((PullSource::Registry { reference }, None))
            }
            Self::Registry(reference) => Ok((PullSource::Registry { reference }, None)),
            Self::Path(path) if path.is_dir() => {
                let layout = Layout::open(&path, None).map_err(|e| e.hint(LAYOUT_HINT))?;
                archive(Some(ArchiveFormat::Oci), None, Content::Layout(layout))
            }
            Self::Path(path) => archive(None, None, open_archive(path, "-".to_owned())?),
            Self::Stdin => {
                refuse_terminal(stdin, "stdin")?;
                let file = stdin
                    .try_clone()
                    .map_err(|e| Error::io("duplicate stdin", e))?;
                archive(None, None, Content::File(file, None))
            }
            Self::Archive(format, path, reference) => {
                let on_stdin = on_stdin(format, reference.as_deref());
                archive(Some(format), reference, open_archive(path, on_stdin)?)
            }
            // The index is reduced to the image that the tag names.
            Self::Layout(dir, tag) => archive(
                Some(ArchiveFormat::Oci),
                None,
                Content::Layout(Layout::open(&dir, tag.as_deref())?),
            ),
        }
    }
}

/// Names an image in an archive on stdin.
fn on_stdin(format: ArchiveFormat, reference: Option<&str>) -> String {
    let transport = match format {
        ArchiveFormat::Oci => "oci-archive",
        ArchiveFormat::Docker => "docker-archive",
    };
    match reference {
        Some(reference) => quote(&format!("{transport}:/dev/stdin:{reference}")),
        None => "-".to_owned(),
    }
}

fn open_archive(path: PathBuf, on_stdin: String) -> Result<Content> {
    let file = pipes::open(&path).map_err(|e| path_error(format!("open {}", path.display()), e))?;
    refuse_terminal(&file, &path.display().to_string())?;
    Ok(Content::File(file, Some(Origin { path, on_stdin })))
}

/// Refuses a terminal as the input. Nobody types an archive, so the user forgot the pipe.
fn refuse_terminal(file: &File, name: &str) -> Result<()> {
    if !file.is_terminal() {
        return Ok(());
    }
    Err(
        Error::invalid(format!("an archive is needed, but {name} is a terminal"))
            .hint("docker save NAME | fcctl image pull -"),
    )
}

impl Content {
    /// Writes the archive. Ends when `stop` fires, even if the input has not ended.
    pub(super) fn send(self, to: &mut dyn Write, stop: &Cancel) -> io::Result<()> {
        match self {
            Self::File(file, origin) => {
                let mut input = pipes::Stoppable::new(file, stop);
                let mut first = Vec::with_capacity(image_file::FIRST_BYTES);
                (&mut input)
                    .take(image_file::FIRST_BYTES as u64)
                    .read_to_end(&mut first)?;
                image_file::refuse_compression(&first, origin.as_ref())
                    .map_err(io::Error::other)?;
                to.write_all(&first)?;
                io::copy(&mut input, to).map(drop)
            }
            Self::Layout(layout) => layout.send(to),
        }
    }
}

/// An OCI layout directory (image-layout.md of the OCI image specification), sent as a tar archive.
#[derive(Debug)]
pub(super) struct Layout {
    dir: PathBuf,
    /// The index with the chosen image only.
    index: Vec<u8>,
    /// The paths of the blobs below `dir`, with manifests before layers.
    blobs: Vec<PathBuf>,
}

impl Layout {
    fn open(dir: &Path, tag: Option<&str>) -> Result<Self> {
        let mut index: Value = read_json(&dir.join(INDEX_FILE))?;
        if let Some(tag) = tag {
            keep_tagged(&mut index, tag).map_err(|e| e.context(dir.display().to_string()))?;
        }
        let mut layout = Self {
            dir: dir.to_owned(),
            index: serde_json::to_vec(&index)
                .map_err(|e| Error::io("copy the index", io::Error::from(e)))?,
            blobs: Vec::new(),
        };
        layout.collect(index)?;
        Ok(layout)
    }

    /// Lists the blobs that the index refers to, directly or through other blobs.
    fn collect(&mut self, index: Value) -> Result<()> {
        let mut seen = BTreeSet::new();
        let mut documents = vec![index];
        while let Some(document) = documents.pop() {
            for descriptor in descriptors(&document) {
                let digest = descriptor["digest"].as_str().unwrap_or_default();
                let Some(path) = blob_path(digest) else {
                    let text = format!("the digest {} is not supported", quoted(digest));
                    return Err(Error::invalid(text));
                };
                if !seen.insert(path.clone()) {
                    continue;
                }
                if seen.len() > BLOBS_MAX {
                    let text = format!("the image has more than {BLOBS_MAX} blobs");
                    return Err(Error::invalid(text));
                }
                let media_type = descriptor["mediaType"].as_str().unwrap_or_default();
                if MANIFEST_TYPES.contains(&media_type) {
                    // An index may list images that the directory does not contain.
                    if self.dir.join(&path).exists() {
                        documents.push(read_json(&self.dir.join(&path))?);
                        self.blobs.push(path);
                    }
                } else {
                    self.blobs.push(path);
                }
            }
        }
        Ok(())
    }

    fn send(self, to: &mut dyn Write) -> io::Result<()> {
        let mut tar = tar::Builder::new(to);
        append(&mut tar, LAYOUT_FILE, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        append(&mut tar, INDEX_FILE, &self.index)?;
        for path in &self.blobs {
            let whole = self.dir.join(path);
            let named =
                |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", whole.display()));
            let file = open_regular(&whole).map_err(named)?;
            let bytes = file.metadata().map_err(named)?.len();
            let mut header = header(bytes);
            // A file that shrinks while it is read ends the archive early, and the daemon refuses
            // it.
            tar.append_data(&mut header, path, file.take(bytes))
                .map_err(named)?;
        }
        tar.into_inner()?.flush()
    }
}

fn header(bytes: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes);
    header.set_mode(0o644);
    header
}

fn append(tar: &mut tar::Builder<&mut dyn Write>, name: &str, bytes: &[u8]) -> io::Result<()> {
    tar.append_data(&mut header(bytes.len() as u64), name, bytes)
}

/// Opens a regular file of a layout. Refuses other files, such as a FIFO that never ends.
fn open_regular(path: &Path) -> io::Result<File> {
    let file = pipes::open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::other("it is not a regular file"))
}

fn read_json(path: &Path) -> Result<Value> {
    let doing = |e: io::Error| Error::io(format!("read {}", path.display()), e);
    let file = open_regular(path).map_err(doing)?;
    let bytes = crate::host::command::read_bounded(file, JSON_BYTES_MAX).map_err(doing)?;
    serde_json::from_slice(&bytes).map_err(|e| doing(io::Error::from(e)))
}

/// Returns the descriptors in an index or a manifest.
fn descriptors(document: &Value) -> Vec<&Value> {
    let lists = ["manifests", "layers"]
        .iter()
        .filter_map(|key| document[*key].as_array())
        .flatten();
    document
        .get("config")
        .filter(|config| config.is_object())
        .into_iter()
        .chain(lists)
        .collect()
}

/// Removes all images from the index except the one with this tag.
fn keep_tagged(index: &mut Value, tag: &str) -> Result<()> {
    let no_image = || {
        Error::invalid(format!("there is no image with the tag {}", quoted(tag)))
            .hint("skopeo list-tags oci:DIR shows the tags")
    };
    let images = index["manifests"].as_array_mut().ok_or_else(no_image)?;
    images.retain(|image| image["annotations"][REF_NAME].as_str() == Some(tag));
    if images.is_empty() {
        return Err(no_image());
    }
    Ok(())
}

fn blob_path(digest: &str) -> Option<PathBuf> {
    let (algorithm, hex) = digest.split_once(':')?;
    let is_known = matches!((algorithm, hex.len()), ("sha256", 64) | ("sha512", 128));
    (is_known && hex.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| Path::new("blobs").join(algorithm).join(hex))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_is_parsed_like_skopeo() {
        let reference = |text: &str| Source::Reference(text.to_owned());
        for (text, expected) in [
            ("-", Source::Stdin),
            ("gcc:13", reference("gcc:13")),
            ("a.tar", reference("a.tar")),
            ("dir/a.tar", reference("dir/a.tar")),
            (
                "docker://ghcr.io/a/b:1",
                Source::Registry("ghcr.io/a/b:1".to_owned()),
            ),
            ("./a.tar:1", Source::Path("./a.tar:1".into())),
            ("../a.tar", Source::Path("../a.tar".into())),
            ("/a.tar", Source::Path("/a.tar".into())),
            (".", Source::Path(".".into())),
            ("oci:dir", Source::Layout("dir".into(), None)),
            (
                "oci:/a/b:v1",
                Source::Layout("/a/b".into(), Some("v1".to_owned())),
            ),
            (
                "docker-archive:x.tar:app:1",
                Source::Archive(
                    ArchiveFormat::Docker,
                    "x.tar".into(),
                    Some("app:1".to_owned()),
                ),
            ),
            (
                "oci-archive:x",
                Source::Archive(ArchiveFormat::Oci, "x".into(), None),
            ),
        ] {
            assert_eq!(text.parse::<Source>().unwrap(), expected, "{text}");
        }
        for bad in ["oci:", "oci-archive::x"] {
            assert!(bad.parse::<Source>().is_err(), "{bad}");
        }
    }

    #[test]
    fn other_transports_of_skopeo_are_refused_with_a_conversion() {
        for (text, hint) in [
            (
                "docker-daemon:app:1",
                "docker save app:1 | fcctl image pull -",
            ),
            (
                "containers-storage:my app",
                "podman save 'my app' | fcctl image pull -",
            ),
            (
                "dir:x",
                "skopeo copy dir:x oci:DIR && fcctl image pull oci:DIR",
            ),
            (
                "tarball:x.tar",
                "skopeo copy tarball:x.tar oci:DIR && fcctl image pull oci:DIR",
            ),
        ] {
            let e = text.parse::<Source>().unwrap_err();
            assert_eq!(e.hint_text(), Some(hint), "{text}");
        }
    }

    fn put(dir: &Path, content: &str) -> String {
        // fcctl does not verify digests, so any hash will do.
        let sum = |n: u64, b: u8| n * 31 % 1_000_003 + u64::from(b);
        let digest = format!("{:064x}", content.bytes().fold(7, sum));
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(&digest), content).unwrap();
        format!("sha256:{digest}")
    }

    fn layout(dir: &Path) {
        let manifest = |layer: &str| {
            let layer = put(dir, layer);
            let config = put(dir, "{}");
            let manifest = serde_json::json!({
                "config": { "digest": config }, "layers": [{ "digest": layer }], "pad": layer
            });
            put(dir, &manifest.to_string())
        };
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let image = |tag: &str, layer: &str| serde_json::json!({ "mediaType": media_type, "digest": manifest(layer), "annotations": { REF_NAME: tag } });
        let index = serde_json::json!({ "manifests": [image("one", "layer 1"), image("two", "the layer 2")] });
        std::fs::write(dir.join(INDEX_FILE), index.to_string()).unwrap();
    }

    fn names(layout: Layout) -> Vec<String> {
        let mut bytes = Vec::new();
        layout.send(&mut bytes).unwrap();
        let mut archive = tar::Archive::new(&bytes[..]);
        let entries = archive.entries().unwrap();
        entries
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect()
    }

    #[test]
    fn layout_is_sent_with_the_blobs_of_the_chosen_image_only() {
        let dir = tempfile::tempdir().unwrap();
        layout(dir.path());
        let sent = names(Layout::open(dir.path(), Some("one")).unwrap());
        assert_eq!(sent[..2], [LAYOUT_FILE, INDEX_FILE]);
        // A manifest, a config and a layer.
        assert_eq!(sent.len(), 5);
        let all = names(Layout::open(dir.path(), None).unwrap());
        assert!(all.len() > sent.len(), "{all:?}");
        let e = Layout::open(dir.path(), Some("three")).unwrap_err();
        assert!(
            e.to_string().contains("no image with the tag \"three\""),
            "{e}"
        );
    }

    #[test]
    fn layout_with_a_bad_digest_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let index = r#"{"manifests":[{"digest":"sha256:../../../etc/passwd"}]}"#;
        std::fs::write(dir.path().join(INDEX_FILE), index).unwrap();
        assert!(Layout::open(dir.path(), None).is_err());
    }

    #[test]
    fn layout_with_a_fifo_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join(INDEX_FILE);
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let e = Layout::open(dir.path(), None).unwrap_err();
        assert!(e.to_string().contains("not a regular file"), "{e}");
    }
}
