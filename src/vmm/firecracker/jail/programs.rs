//! Checks that the jailer and Firecracker are suitable for a jail.

use super::super::version::install_if_missing;
use crate::config::Firecracker as Config;
use crate::error::{Error, Kind, Result};
use crate::host::program;
use object::elf::{FileHeader64, PT_INTERP};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, ReadCache};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The paths of two programs that are suitable for a jail.
pub(crate) struct Programs {
    pub jailer: PathBuf,
    pub firecracker: PathBuf,
}

/// Finds the jailer and Firecracker, and checks that they are suitable for a jail.
///
/// # Errors
/// `command_missing` or `unsupported`, with a hint.
pub(crate) fn programs(config: &Config) -> Result<Programs> {
    let find = |name: &Path| {
        let path = program::locate(name).map_err(install_if_missing)?;
        path.canonicalize()
            .map_err(|e| Error::io(format!("look at {}", path.display()), e))
    };
    let jailer = find(&config.jailer)?;
    let firecracker = find(&config.binary)?;
    for program in [&jailer, &firecracker] {
        is_roots(program)?;
    }
    is_static(&firecracker)?;
    Ok(Programs {
        jailer,
        firecracker,
    })
}

/// Checks that only root can write a program that runs as root, or that root runs for others.
pub(super) fn is_roots(program: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    // A user who can write a directory can replace the files in it, unless the directory is sticky.
    for path in program.ancestors() {
        let shown = path.display();
        let stat = std::fs::metadata(path).map_err(|e| Error::io(format!("look at {shown}"), e))?;
        let is_sticky = stat.is_dir() && stat.mode() & 0o1000 != 0;
        if stat.uid() != 0 || (stat.mode() & 0o022 != 0 && !is_sticky) {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "jail {}: users other than root may write {shown}",
                    program.display()
                ),
            )
            .hint(format!("chown root {shown}; chmod go-w {shown}")));
        }
    }
    Ok(())
}

/// Checks that a program is statically linked, because the jail contains no dynamic linker.
pub(super) fn is_static(program: &Path) -> Result<()> {
    let shown = program.display();
    let dynamic = has_interpreter(program).map_err(|e| Error::io(format!("read {shown}"), e))?;
    if dynamic {
        return Err(Error::new(
            Kind::Unsupported,
            format!("jail {shown}: it is dynamically linked"),
        )
        .hint("use the static one from a release, or set jail = false under [firecracker]"));
    }
    Ok(())
}

pub(super) fn has_interpreter(program: &Path) -> std::io::Result<bool> {
    crate::locks::may_block("file access");
    let file = ReadCache::new(std::fs::File::open(program)?);
    let invalid = |_| std::io::Error::other("it is not a 64-bit ELF file");
    let header = FileHeader64::<LittleEndian>::parse(&file).map_err(invalid)?;
    let endian = header.endian().map_err(invalid)?;
    let segments = header.program_headers(endian, &file).map_err(invalid)?;
    Ok(segments.iter().any(|s| s.p_type(endian) == PT_INTERP))
}
