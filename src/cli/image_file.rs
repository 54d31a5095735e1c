//! Recognises archives by their first bytes, as far as `image pull` has to know what a file is.

use super::pipes;
use crate::error::{Error, Kind, Result};
use crate::host::shell::quote;
use crate::host::text::quoted;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Enough bytes for the signature of a tar archive, which is in its first header.
pub(super) const FIRST_BYTES: usize = TAR_AT + TAR.len();
const TAR_AT: usize = 257;
const TAR: &[u8] = b"ustar";
/// The signatures of compressions that the daemon reads: gzip and zstd.
const READABLE: &[&[u8]] = &[b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"];
/// Compressions that it does not read: the program that decompresses them, and the signature.
const OTHERS: &[(&str, &[u8])] = &[("xz", b"\xfd7zXZ\0"), ("bzip2", b"BZh")];
/// The header of a bzip2 block, which comes after `BZh` and one digit. A tar archive whose first
/// file is called `BZh9` does not have it there.
const BZIP2_BLOCK: &[u8] = b"1AY&SY";

/// A file with an archive.
#[derive(Debug)]
pub(super) struct Origin {
    pub(super) path: PathBuf,
    /// The argument of `image pull` for the same image if the archive comes from stdin.
    pub(super) on_stdin: String,
}

/// Returns the program that decompresses these first bytes of an archive, if the daemon cannot.
fn decompressor(first: &[u8]) -> Option<&'static str> {
    let (program, _) = OTHERS
        .iter()
        .find(|(_, signature)| first.starts_with(signature))?;
    let is_sure = *program != "bzip2" || first.get(4..).is_some_and(|b| b.starts_with(BZIP2_BLOCK));
    is_sure.then_some(*program)
}

fn is_archive(first: &[u8]) -> bool {
    let is_tar = first.get(TAR_AT..).is_some_and(|b| b.starts_with(TAR));
    let is_compressed = READABLE
        .iter()
        .any(|signature| first.starts_with(signature));
    is_tar || is_compressed || decompressor(first).is_some()
}

/// Refuses an archive whose compression the daemon does not read. `origin` is None for stdin.
pub(super) fn refuse_compression(first: &[u8], origin: Option<&Origin>) -> Result<()> {
    let Some(program) = decompressor(first) else {
        return Ok(());
    };
    let (place, hint) = match origin {
        Some(Origin { path, on_stdin }) => {
            let file = path.to_string_lossy();
            let word = quote(&file);
            let command = format!("{program} -dc {word} | fcctl image pull {on_stdin}");
            (format!("in {file}"), command)
        }
        None => {
            let command = format!("decompress it: ... | {program} -dc | fcctl image pull -");
            ("on stdin".to_owned(), command)
        }
    };
    let text = format!("the archive {place} is compressed with {program}");
    Err(Error::new(Kind::Unsupported, text).hint(hint))
}

/// Refuses a reference that is also the name of an archive or of an OCI layout in the current
/// directory, because the user most likely means the file. Ignores a file that cannot be read.
pub(super) fn refuse_name_of_file(reference: &str) -> Result<()> {
    let path = Path::new(reference);
    let what = if path.join("oci-layout").is_file() {
        "a directory with an OCI layout"
    } else if first_bytes(path).is_ok_and(|first| is_archive(&first)) {
        "a file with an archive"
    } else {
        return Ok(());
    };
    let text = format!("{} is {what}", quoted(reference));
    let word = quote(reference);
    Err(Error::invalid(text).hint(format!(
        "to read it: fcctl image pull ./{word}\n\
         to pull from a registry: fcctl image pull docker://{word}"
    )))
}

/// Reads the beginning of a regular file.
fn first_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let file: File = pipes::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut first = Vec::with_capacity(FIRST_BYTES);
    file.take(FIRST_BYTES as u64).read_to_end(&mut first)?;
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(1);
        // A name that begins like a bzip2 file.
        builder.append_data(&mut header, "BZh9", &b"x"[..]).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn archives_are_recognised_by_their_first_bytes() {
        for (bytes, program) in [
            (&tar()[..], None),
            (b"\x1f\x8b\x08\0", None),
            (b"\x28\xb5\x2f\xfd\0", None),
            (b"\xfd7zXZ\0\0", Some("xz")),
            (b"BZh91AY&SYxx", Some("bzip2")),
        ] {
            assert!(is_archive(bytes), "{bytes:?}");
            assert_eq!(decompressor(bytes), program, "{bytes:?}");
        }
        for other in [&b""[..], b"BZh9", b"#!/bin/sh\n", &[0; 600]] {
            assert!(!is_archive(other), "{other:?}");
        }
    }

    #[test]
    fn unreadable_compression_is_refused_with_command() {
        let xz = b"\xfd7zXZ\0\0";
        let origin = Origin {
            path: "my app.tar.xz".into(),
            on_stdin: "-".to_owned(),
        };
        let e = refuse_compression(xz, Some(&origin)).unwrap_err();
        assert_eq!(
            e.hint_text(),
            Some("xz -dc 'my app.tar.xz' | fcctl image pull -")
        );
        let e = refuse_compression(b"BZh91AY&SYxx", None).unwrap_err();
        assert_eq!(
            e.to_string(),
            "the archive on stdin is compressed with bzip2"
        );
        assert!(refuse_compression(&tar(), None).is_ok());
    }

    #[test]
    fn name_of_archive_or_layout_is_refused_as_reference() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(path("app.tar"), tar()).unwrap();
        std::fs::write(path("alpine"), "#!/bin/sh").unwrap();
        std::fs::create_dir(path("gcc")).unwrap();
        std::fs::create_dir(path("layout")).unwrap();
        std::fs::write(path("layout/oci-layout"), "{}").unwrap();
        for (name, what) in [
            ("app.tar", "is a file with an archive"),
            ("layout", "is a directory with an OCI layout"),
        ] {
            let e = refuse_name_of_file(&path(name)).unwrap_err();
            assert!(e.to_string().ends_with(what), "{e}");
        }
        for name in ["alpine", "gcc", "absent"] {
            refuse_name_of_file(&path(name)).unwrap();
        }
    }
}
