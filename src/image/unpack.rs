//! Unpacks kernels and modules with the host's programs for their compression.

use super::kernel::{self, Compression};
use super::registry::KERNEL;
use crate::error::{Error, Kind, Result};
use crate::host::{Command, Commands};
use crate::locks::Cancel;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

const UNPACK_DEADLINE: Duration = Duration::from_secs(60);

/// Unpacks a bzImage's payload to `out/vmlinux`.
pub(super) fn unpack(
    commands: &dyn Commands,
    payload: &kernel::Payload<'_>,
    out: &Path,
    cancel: &Cancel,
) -> Result<()> {
    crate::locks::may_block("file access");
    let packed = out.join(format!("vmlinux.{}", payload.compression.program().1));
    std::fs::write(&packed, payload.bytes)
        .map_err(|e| Error::io("write the kernel's payload", e))?;
    unpack_file(
        commands,
        payload.compression,
        (&packed, &out.join(KERNEL)),
        payload.unpacked_bytes.into(),
        cancel,
    )?;
    let file =
        File::open(out.join(KERNEL)).map_err(|e| Error::io("open the unpacked kernel", e))?;
    let mut magic = [0; 4];
    let is_elf = file.read_exact_at(&mut magic, 0).is_ok() && magic == *b"\x7fELF";
    let bytes = file
        .metadata()
        .map_err(|e| Error::io("read the unpacked kernel's size", e))?
        .len();
    if !is_elf || bytes != u64::from(payload.unpacked_bytes) {
        return Err(Error::new(
            Kind::Unsupported,
            "the unpacked kernel is not a complete ELF file",
        ));
    }
    Ok(())
}

/// Unpacks `packed` to `to` and then removes `packed`. `packed` has the suffix of its compression,
/// and `to` is its name without the suffix. Fails if the result is larger than `bytes_max`, so that
/// it cannot fill the disk.
pub(super) fn unpack_file(
    commands: &dyn Commands,
    compression: Compression,
    (packed, to): (&Path, &Path),
    bytes_max: u64,
    cancel: &Cancel,
) -> Result<()> {
    crate::locks::may_block("file access");
    let command = unpack_command(compression, packed, to).file_bytes_max(bytes_max);
    commands
        .run(&command, cancel, &mut |_| {})
        .map_err(|e| match e.kind() {
            Kind::CommandMissing => {
                e.hint(format!("sudo apt-get install {}", compression.program().0))
            }
            Kind::CommandFailed => e.hint(format!(
                "it is damaged, or larger than {bytes_max} bytes when unpacked"
            )),
            _ => e,
        })?;
    match std::fs::remove_file(packed) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", packed.display()), e))
        }
        _ => Ok(()),
    }
}

fn unpack_command(compression: Compression, packed: &Path, to: &Path) -> Command {
    let command = Command::new(compression.program().0)
        .args(["-d", "-f", "-q"])
        .arg(packed)
        .deadline(UNPACK_DEADLINE);
    match compression {
        Compression::Lz4 => command.arg(to),
        Compression::Zstd => command.arg("-o").arg(to),
        // These programs write to the name of the input without its suffix.
        Compression::Xz | Compression::Gzip => command,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_of_every_compression_is_unpacked() {
        let text = b"\x7fELF and so on".repeat(10);
        let cancel = Cancel::try_new().unwrap();
        for compression in [
            Compression::Lz4,
            Compression::Zstd,
            Compression::Xz,
            Compression::Gzip,
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (program, suffix) = compression.program();
            let (plain, packed) = (
                dir.path().join("vmlinux"),
                dir.path().join(format!("vmlinux.{suffix}")),
            );
            std::fs::write(&plain, &text).unwrap();
            // The kernel's build uses lz4's legacy frame (-l).
            let pack = Command::new(program)
                .args(if program == "lz4" {
                    &["-q", "-l"][..]
                } else {
                    &["-q"][..]
                })
                .arg(&plain);
            let pack = if program == "lz4" {
                pack.arg(&packed)
            } else {
                pack
            };
            crate::host::HostCommands
                .run(&pack, &cancel, &mut |_| {})
                .unwrap();
            let _ = std::fs::remove_file(&plain);
            let command = unpack_command(compression, &packed, &plain);
            crate::host::HostCommands
                .run(&command, &cancel, &mut |_| {})
                .unwrap();
            assert_eq!(std::fs::read(&plain).unwrap(), text, "{program}");
        }
    }
}
