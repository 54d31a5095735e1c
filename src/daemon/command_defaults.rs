//! The defaults of commands in a VM: a user, a directory and variables. The options of a single
//! command override them.
//!
//! The values of variables may be secrets. They are in a file of the VM's directory that only the
//! daemon's user can read, in the private directory of each snapshot, and on the seed drives of
//! guests whose login shell needs them. The store, logs and replies have only their names.
//!
//! In a guest that boots with a guest runtime, the login shell gets the settings from the seed
//! drive, for commands and for plain ssh. In another guest, the daemon passes them with each
//! command, and a file in `/etc/profile.d` has the variables for ssh.

use super::core::Core;
use super::guest_scripts::Layout;
use super::snapshot_registry::Files;
use super::vm_dir::ENV_FILE;
use crate::api::image::ImageConfig;
use crate::api::vm::{CommandDefaults, VmCreateRequest};
use crate::disk::SeedFile;
use crate::error::{Error, Kind, Result};
use crate::guest::{GuestUser, check_variable};
use crate::host::command::read_bounded;
use crate::host::fs::{create_dir, open_nofollow, write_durable};
use crate::host::shell::quote;
use crate::host::time::now_s;
use crate::ids::VmId;
use crate::store::{VmRow, VmShape};
use std::path::Path;

/// The limit for the names and values of a VM's variables together. They are on the seed drive, and
/// in the command line of each command.
const ENV_BYTES_MAX: usize = 64 << 10;
const VARIABLES_MAX: usize = 512;
const WORKDIR_BYTES_MAX: usize = 4096;
/// The file in a guest without a guest runtime from which shells read the VM's variables.
pub(super) const PROFILE_FILE: &str = "/etc/profile.d/fcd-environment.sh";
/// Everybody in the guest may log in, so everybody may read the file.
const PROFILE_MODE: u32 = 0o644;

/// A variable and its value.
pub(super) type Variable = (String, String);

/// Checks the settings of a request, and returns those that the row keeps.
pub(super) fn checked(request: &VmCreateRequest) -> Result<CommandDefaults> {
    if let Some(user) = &request.user {
        GuestUser::parse(user)?;
    }
    if let Some(dir) = &request.workdir {
        check_workdir(dir)?;
    }
    for (name, value) in &request.env {
        check_variable(name)?;
        if value.contains('\0') {
            return Err(Error::invalid(format!(
                "the value of {name} contains a NUL"
            )));
        }
    }
    let variables = unique(&request.env);
    let bytes = encode(&variables).len();
    if variables.len() > VARIABLES_MAX || bytes > ENV_BYTES_MAX {
        let text = format!(
            "a VM may have at most {VARIABLES_MAX} variables with {ENV_BYTES_MAX} bytes in total, \
             but {} with {bytes} bytes were given",
            variables.len()
        );
        return Err(Error::invalid(text).hint("leave some out, or copy a file: fcctl cp"));
    }
    Ok(CommandDefaults {
        user: request.user.clone(),
        workdir: request.workdir.clone(),
        env: variables.into_iter().map(|(name, _)| name).collect(),
    })
}

fn check_workdir(dir: &str) -> Result<()> {
    if dir.starts_with('/') && dir.len() <= WORKDIR_BYTES_MAX && !dir.contains('\0') {
        return Ok(());
    }
    Err(
        Error::invalid("the directory of a VM's commands must be an absolute path")
            .hint("for example --workdir /srv/app"),
    )
}

/// Keeps the last value of each variable.
fn unique(env: &[Variable]) -> Vec<Variable> {
    let mut kept: Vec<Variable> = Vec::new();
    for (name, value) in env {
        match kept.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => old.clone_from(value),
            None => kept.push((name.clone(), value.clone())),
        }
    }
    kept
}

/// Creates the directory of a new VM and writes the VM's variables into it, if there are any.
pub(super) fn write(core: &Core, vm: &VmId, env: &[Variable]) -> Result<()> {
    if env.is_empty() {
        return Ok(());
    }
    let dir = core.vm_dir(vm);
    core.effects.before("write the variables")?;
    drop(create_dir(&dir, 0o710)?);
    write_file(&dir.join(ENV_FILE), env)
}

/// Writes the variables of a VM into a snapshot of it.
pub(super) fn save(core: &Core, row: &VmRow, files: &Files) -> Result<()> {
    match read(core, row)? {
        env if env.is_empty() => Ok(()),
        env => write_file(&files.env, &env),
    }
}

fn write_file(path: &Path, env: &[Variable]) -> Result<()> {
    write_durable(path, &encode(&unique(env)), 0o600)
}

/// Returns the variables of a VM with their values.
pub(super) fn read(core: &Core, row: &VmRow) -> Result<Vec<Variable>> {
    read_file(&row.shape, &core.vm_dir(&row.id).join(ENV_FILE))
        .map_err(|e| e.context(format!("read the variables of VM {}", row.name)))
}

/// Returns the variables that a snapshot of this shape has.
pub(super) fn read_saved(shape: &VmShape, files: &Files) -> Result<Vec<Variable>> {
    read_file(shape, &files.env).map_err(|e| e.context("read the variables of the snapshot"))
}

fn read_file(shape: &VmShape, path: &Path) -> Result<Vec<Variable>> {
    if shape.commands.env.is_empty() {
        return Ok(Vec::new());
    }
    let bytes = read_bounded(open_nofollow(path)?, ENV_BYTES_MAX as u64)
        .map_err(|e| Error::io(format!("read {}", path.display()), e))?;
    decode(&bytes).ok_or_else(|| {
        let text = format!("{} is damaged", path.display());
        Error::new(Kind::Host, text).hint("create the VM again")
    })
}

/// Encodes variables as `NAME=VALUE`, each followed by a NUL.
fn encode(env: &[Variable]) -> Vec<u8> {
    let records = env.iter().map(|(name, value)| format!("{name}={value}\0"));
    records.collect::<String>().into_bytes()
}

fn decode(bytes: &[u8]) -> Option<Vec<Variable>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let records = text.strip_suffix('\0')?.split('\0');
    let variable = |record: &str| {
        let (name, value) = record.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    };
    records.map(variable).collect()
}

/// Returns the variables that the daemon has to pass with each command.
pub(super) fn passed(core: &Core, row: &VmRow) -> Result<Vec<(String, Vec<u8>)>> {
    match Layout::of(row) {
        Layout::Runtime => Ok(Vec::new()),
        Layout::Own => Ok(read(core, row)?
            .into_iter()
            .map(|(name, value)| (name, value.into_bytes()))
            .collect()),
    }
}

/// Returns shell commands that make the VM's own directory for commands if it does not exist, as
/// docker does. Empty if `workdir` is another directory.
pub(super) fn make_directory(row: &VmRow, workdir: Option<&[u8]>) -> Vec<u8> {
    let own = row.shape.commands.workdir.as_deref();
    let own = own.filter(|own| workdir == Some(own.as_bytes()));
    own.map_or_else(Vec::new, |dir| {
        let dir = quote(dir);
        format!("[ -d {dir} ] || mkdir -p {dir} 2>/dev/null; ").into_bytes()
    })
}

/// Returns the command settings for the login shell of a guest runtime: those of the image,
/// replaced or extended by those of the VM.
pub(super) fn settings(core: &Core, row: &VmRow, image: &ImageConfig) -> Result<ImageConfig> {
    let mut settings = image.clone();
    let CommandDefaults { user, workdir, .. } = row.shape.commands.clone();
    settings.user = user.unwrap_or(settings.user);
    settings.working_dir = workdir.unwrap_or(settings.working_dir);
    let own = read(core, row)?.into_iter();
    settings
        .env
        .extend(own.map(|(name, value)| format!("{name}={value}")));
    Ok(settings)
}

/// Returns the file with the variables for shells in a guest without a guest runtime.
pub(super) fn profile(core: &Core, row: &VmRow) -> Result<Option<SeedFile>> {
    if Layout::of(row) == Layout::Runtime || row.shape.commands.env.is_empty() {
        return Ok(None);
    }
    let lines = read(core, row)?
        .into_iter()
        .map(|(name, value)| format!("export {name}={}\n", quote(&value)));
    Ok(Some(SeedFile {
        path: PROFILE_FILE.into(),
        mode: PROFILE_MODE,
        mtime_s: now_s(),
        bytes: lines.collect::<String>().into_bytes(),
    }))
}

/// Returns the path of the file that [`profile`] makes, or `None` if the VM has no such file.
pub(super) fn profile_path(row: &VmRow) -> Option<String> {
    let has = Layout::of(row) == Layout::Own && !row.shape.commands.env.is_empty();
    has.then(|| PROFILE_FILE.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(env: &[(&str, &str)]) -> VmCreateRequest {
        let env = env.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
        VmCreateRequest {
            env: env.collect(),
            ..VmCreateRequest::default()
        }
    }

    #[test]
    fn variables_round_trip_and_last_value_wins() {
        let env = request(&[("A", "1=\n2"), ("B", ""), ("A", "é'")]).env;
        let kept = unique(&env);
        assert_eq!(decode(&encode(&kept)), Some(kept.clone()));
        assert_eq!(kept, request(&[("A", "é'"), ("B", "")]).env);
        for bad in [&b""[..], b"A=1", b"A\0", b"A=\xff\0"] {
            assert_eq!(decode(bad), None, "{bad:?}");
        }
        assert_eq!(checked(&request(&[("A", "s3cret")])).unwrap().env, ["A"]);
    }

    #[test]
    fn malformed_settings_are_refused() {
        let long = "x".repeat(ENV_BYTES_MAX);
        for env in [
            &[("1", "")][..],
            &[("", "")],
            &[("A", "\0")],
            &[("A", &long)],
        ] {
            assert!(checked(&request(env)).is_err(), "{:?}", env[0].0);
        }
        let with = |user: Option<&str>, workdir: Option<&str>| VmCreateRequest {
            user: user.map(str::to_owned),
            workdir: workdir.map(str::to_owned),
            ..VmCreateRequest::default()
        };
        assert!(checked(&with(Some("dev:dev"), Some("/x"))).is_ok());
        for bad in [
            with(Some("a:b:c"), None),
            with(None, Some("x")),
            with(None, Some("")),
        ] {
            assert!(checked(&bad).is_err(), "{bad:?}");
        }
    }
}
