//! Parses a `devcontainer.json`. All functions are pure.

use super::super::values::parse_size;
use super::variables::{self, Refused, Variables, is_name};
use crate::error::{Error, Result};
use crate::host::text::quoted;
use crate::ids::ImageRef;
use serde_json::{Map, Value};

/// How many ports a file may ask for.
const PORTS_MAX: usize = 64;

/// The settings of a `devcontainer.json`.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Config {
    pub image: Option<ImageRef>,
    pub cpus: Option<u32>,
    pub memory_mib: Option<u64>,
    pub disk_bytes: Option<u64>,
    pub ports: Vec<u16>,
    /// The variables of `containerEnv` and then those of `remoteEnv`. None removes a variable.
    pub env: Vec<(String, Option<String>)>,
    pub user: Option<String>,
    /// The commands to run once, in a new VM.
    pub once: Vec<Step>,
    /// The command to run after each start.
    pub at_start: Option<Step>,
    /// The last command to wait for, if the file names one.
    pub wait_for: Option<&'static str>,
    /// One sentence for each setting that is ignored.
    pub notes: Vec<String>,
}

/// One of the commands of a file.
#[derive(Debug, PartialEq)]
pub(super) struct Step {
    pub key: &'static str,
    pub run: Run,
}

#[derive(Debug, PartialEq)]
pub(super) enum Run {
    /// A line for a shell.
    Line(String),
    /// A program with its arguments.
    Words(Vec<String>),
    /// Commands that run at the same time.
    Parallel(Vec<(String, Run)>),
}

/// The commands that run in the guest, in their order.
const ONCE: [&str; 3] = [
    "onCreateCommand",
    "updateContentCommand",
    "postCreateCommand",
];
const AT_START: &str = "postStartCommand";
/// The key of a command for the host.
const INITIALIZE: &str = "initializeCommand";

/// Unsupported settings, each with an alternative.
const REFUSED: &[(&[&str], &str)] = &[
    (
        &["build", "dockerFile", "context"],
        "fcd does not build images from a Dockerfile: build it with docker, run `docker save IMAGE | fcctl image pull -`, and name it with \"image\"",
    ),
    (
        &["dockerComposeFile", "service", "runServices"],
        "fcd does not run several containers together: name one \"image\", and start the other services in the VM, for example with docker compose in postStartCommand",
    ),
    (
        &["features"],
        "fcd does not install features: install what you need with postCreateCommand, or once for all VMs with fcctl image build --script",
    ),
    (
        &["mounts", "workspaceMount"],
        "fcd copies directories and does not mount them: copy others with fcctl workspace prepare VM PATH, and use \"workspaceFolder\" for the place of this one",
    ),
    (
        &["runArgs"],
        "these are options of docker: use \"hostRequirements\", \"forwardPorts\", \"containerEnv\" and \"remoteUser\" for what they set",
    ),
    (
        &["appPort"],
        "use \"forwardPorts\", which publishes a port on 127.0.0.1",
    ),
];

/// Keys that change nothing here.
const IGNORED: &[&str] = &[
    "$schema",
    "name",
    "customizations",
    "settings",
    "extensions",
    "devPort",
    "portsAttributes",
    "otherPortsAttributes",
    "updateRemoteUserUID",
    "overrideCommand",
    "shutdownAction",
    "userEnvProbe",
    "secrets",
    "init",
];

/// Parses a file with comments and trailing commas.
pub(super) fn json(text: &str) -> Result<Map<String, Value>> {
    // A byte order mark is not part of the text.
    let mut text = text.strip_prefix('\u{feff}').unwrap_or(text).to_owned();
    let hint = "correct the file; comments and trailing commas are allowed";
    json_strip_comments::strip(&mut text)
        .map_err(|_| Error::invalid("a comment or a text has no end").hint(hint))?;
    let value: Value = serde_json::from_str(&text)
        .map_err(|e| Error::invalid(format!("not JSON: {e}")).hint(hint))?;
    match value {
        Value::Object(members) => Ok(members),
        _ => Err(Error::invalid("not a JSON object")),
    }
}

/// Refuses a file that asks for something that fcd does not do, with all reasons at once.
pub(super) fn check_keys(members: &Map<String, Value>) -> Result<()> {
    let mut keys = Vec::new();
    let mut hints = Vec::new();
    for (names, instead) in REFUSED {
        let found = names
            .iter()
            .find(|name| members.get(**name).is_some_and(|value| !is_empty(value)));
        if let Some(name) = found {
            keys.push(*name);
            hints.push(format!("{name}: {instead}"));
        }
    }
    if keys.is_empty() {
        return Ok(());
    }
    let verb = if keys.len() == 1 { "is" } else { "are" };
    Err(Error::invalid(format!("{} {verb} not supported", keys.join(", "))).hint(hints.join("\n")))
}

/// True for a value that asks for nothing, such as `"mounts": []`.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.is_empty(),
        _ => false,
    }
}

/// Returns the directory of the project in the guest, if the file names one. `name` is the name of
/// the project's directory.
pub(super) fn folder(members: &Map<String, Value>, name: &str) -> Result<Option<String>> {
    let Some(folder) = text(members, "workspaceFolder")? else {
        return Ok(None);
    };
    let folder = folder.replace("${localWorkspaceFolderBasename}", name);
    if folder.contains("${") {
        let text = format!(
            "workspaceFolder: {} has an unknown variable",
            quoted(&folder)
        );
        return Err(Error::invalid(text).hint("use ${localWorkspaceFolderBasename}"));
    }
    Ok(Some(folder))
}

/// Reads a file whose keys [`check_keys`] accepts.
pub(super) fn config(mut members: Map<String, Value>, variables: &Variables<'_>) -> Result<Config> {
    let mut refused = Refused::default();
    let mut notes = Vec::new();
    for (key, value) in &mut members {
        if key == INITIALIZE {
            notes.push(format!(
                "{INITIALIZE} is not run: nothing that a repository asks for runs on this host"
            ));
        } else if key == "postAttachCommand" {
            notes.push("postAttachCommand is not run, because no editor attaches".to_owned());
        } else if matches!(key.as_str(), "privileged" | "capAdd" | "securityOpt") {
            notes.push(format!(
                "{key} is not needed: root in a guest may do everything in that guest's kernel"
            ));
        } else if SUPPORTED.contains(&key.as_str()) {
            variables::replace(value, variables, &mut refused);
        } else if !IGNORED.contains(&key.as_str()) && !is_empty(value) {
            notes.push(format!("{} is unknown and is ignored", quoted(key)));
        }
    }
    if !refused.is_empty() {
        return Err(refusal(&refused));
    }
    let mut env = environment(&members, "containerEnv")?;
    env.extend(environment(&members, "remoteEnv")?);
    let needs = members.get("hostRequirements");
    let (cpus, memory_mib, disk_bytes) = match needs {
        Some(Value::Object(needs)) => {
            if gpu_is_required(needs.get("gpu")) {
                notes.push("hostRequirements.gpu: VMs have no GPU".to_owned());
            }
            (
                cpus(needs)?,
                size(needs, "memory")?.map(|bytes| bytes.div_ceil(1 << 20)),
                size(needs, "storage")?,
            )
        }
        None | Some(Value::Null) => (None, None, None),
        Some(_) => return Err(Error::invalid("hostRequirements is not an object")),
    };
    let image = text(&members, "image")?
        .map(|image| image.parse::<ImageRef>().map_err(|e| e.context("image")))
        .transpose()?;
    let user = match text(&members, "remoteUser")? {
        Some(user) => Some(user),
        None => text(&members, "containerUser")?,
    };
    let mut once = Vec::new();
    for key in ONCE {
        once.extend(step(&members, key)?);
    }
    Ok(Config {
        image,
        cpus,
        memory_mib,
        disk_bytes,
        ports: ports(&members)?,
        env,
        user: user.filter(|user| !user.is_empty()),
        once,
        at_start: step(&members, AT_START)?,
        wait_for: wait_for(&members)?,
        notes,
    })
}

/// The keys whose values are used.
const SUPPORTED: &[&str] = &[
    "image",
    "hostRequirements",
    "forwardPorts",
    "containerEnv",
    "remoteEnv",
    "remoteUser",
    "containerUser",
    "workspaceFolder",
    "onCreateCommand",
    "updateContentCommand",
    "postCreateCommand",
    "postStartCommand",
    "waitFor",
];

fn refusal(refused: &Refused) -> Error {
    if refused.host_path {
        return Error::invalid("${localWorkspaceFolder} is a path of this host")
            .hint("use ${containerWorkspaceFolder}, the directory in the VM");
    }
    let names: Vec<&str> = refused.local.iter().map(String::as_str).collect();
    let flags: String = names
        .iter()
        .map(|name| format!(" --allow-env {}", crate::host::shell::quote(name)))
        .collect();
    Error::invalid(format!(
        "the file asks for variables of your own environment, which may be secrets: {}",
        names.join(", ")
    ))
    .hint(format!("if the guest may have them: fcctl up{flags}"))
}

fn text(members: &Map<String, Value>, key: &str) -> Result<Option<String>> {
    match members.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => no_nul(key, text).map(Some),
        Some(_) => Err(Error::invalid(format!("{key} is not a string"))),
    }
}

fn no_nul(key: &str, text: &str) -> Result<String> {
    if text.contains('\0') {
        return Err(Error::invalid(format!("{key} contains a NUL")));
    }
    Ok(text.to_owned())
}

fn environment(members: &Map<String, Value>, key: &str) -> Result<Vec<(String, Option<String>)>> {
    let members = match members.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(members)) => members,
        Some(_) => return Err(Error::invalid(format!("{key} is not an object"))),
    };
    let one = |(name, value): (&String, &Value)| {
        if !is_name(name) {
            let text = format!("{key}: {} is not a variable's name", quoted(name));
            return Err(Error::invalid(text));
        }
        match value {
            Value::String(text) => Ok((name.clone(), Some(no_nul(key, text)?))),
            Value::Null => Ok((name.clone(), None)),
            _ => Err(Error::invalid(format!("{key}.{name} is not a string"))),
        }
    };
    members.iter().map(one).collect()
}

fn cpus(needs: &Map<String, Value>) -> Result<Option<u32>> {
    match needs.get("cpus") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
            Some(cpus) if cpus > 0 => Ok(Some(cpus)),
            _ => Err(Error::invalid(
                "hostRequirements.cpus is not a number of CPUs",
            )),
        },
    }
}

fn size(needs: &Map<String, Value>, key: &str) -> Result<Option<u64>> {
    let Some(text) = text(needs, key).map_err(|e| e.context("hostRequirements"))? else {
        return Ok(None);
    };
    match parse_size(&text) {
        Ok(bytes) if bytes > 0 => Ok(Some(bytes)),
        _ => Err(Error::invalid(format!(
            "hostRequirements.{key}: {} is not a size such as 8gb",
            quoted(&text)
        ))),
    }
}

fn gpu_is_required(gpu: Option<&Value>) -> bool {
    match gpu {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::String(text)) => text != "optional",
        Some(_) => true,
    }
}

fn ports(members: &Map<String, Value>) -> Result<Vec<u16>> {
    let items = match members.get("forwardPorts") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(items)) => items,
        Some(_) => return Err(Error::invalid("forwardPorts is not a list")),
    };
    if items.len() > PORTS_MAX {
        let text = format!("forwardPorts has more than {PORTS_MAX} ports");
        return Err(Error::invalid(text));
    }
    let mut ports = Vec::new();
    for item in items {
        let port = port(item)?;
        if !ports.contains(&port) {
            ports.push(port);
        }
    }
    Ok(ports)
}

fn port(item: &Value) -> Result<u16> {
    let number = match item {
        Value::Number(number) => number.as_u64().and_then(|n| u16::try_from(n).ok()),
        Value::String(text) => match text.rsplit_once(':') {
            None => text.parse().ok(),
            Some(("localhost" | "127.0.0.1" | "0.0.0.0", port)) => port.parse().ok(),
            Some(_) => {
                let text = format!("forwardPorts: {} is not a port of this VM", quoted(text));
                return Err(Error::invalid(text).hint("name ports of the VM, such as 3000"));
            }
        },
        _ => None,
    };
    number.filter(|port| *port > 0).ok_or_else(|| {
        Error::invalid(format!(
            "forwardPorts: {} is not a port",
            quoted(&item.to_string())
        ))
    })
}

fn step(members: &Map<String, Value>, key: &'static str) -> Result<Option<Step>> {
    match members.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) if is_empty(value) || value.as_str() == Some("") => Ok(None),
        Some(Value::Object(commands)) => {
            let mut all = Vec::new();
            for (name, value) in commands {
                if !is_empty(value) {
                    all.push((name.clone(), run(key, value)?));
                }
            }
            let run = Run::Parallel(all);
            Ok(Some(Step { key, run }))
        }
        Some(value) => Ok(Some(Step {
            key,
            run: run(key, value)?,
        })),
    }
}

fn run(key: &str, value: &Value) -> Result<Run> {
    let bad = || {
        Error::invalid(format!(
            "{key} is not a string, a list of strings or an object of these"
        ))
    };
    match value {
        Value::String(line) => Ok(Run::Line(no_nul(key, line)?)),
        Value::Array(words) => {
            let word = |word: &Value| no_nul(key, word.as_str().ok_or_else(bad)?);
            words
                .iter()
                .map(word)
                .collect::<Result<_>>()
                .map(Run::Words)
        }
        _ => Err(bad()),
    }
}

fn wait_for(members: &Map<String, Value>) -> Result<Option<&'static str>> {
    let Some(name) = text(members, "waitFor")? else {
        return Ok(None);
    };
    let known = [INITIALIZE].into_iter().chain(ONCE).chain([AT_START]);
    let names: Vec<&str> = known.collect();
    match names.iter().find(|known| **known == name) {
        Some(known) => Ok(Some(known)),
        None => Err(Error::invalid(format!(
            "waitFor: {} is not a command of the file",
            quoted(&name)
        ))
        .hint(format!("use one of {}", names.join(", ")))),
    }
}

impl Config {
    /// Returns the variables whose values do not depend on the guest. Only login shells set the
    /// others, and unset the variables that the file removes.
    pub(super) fn constants(&self, of_image: &[String]) -> Vec<(String, String)> {
        variables::constants(&self.env, of_image)
    }

    /// True if `up` waits for the command `key`. The commands after that of `waitFor` run in the
    /// background.
    pub(super) fn is_waited_for(&self, key: &str) -> bool {
        let place = |key: &str| {
            let order = [INITIALIZE].into_iter().chain(ONCE).chain([AT_START]);
            order.into_iter().position(|known| known == key)
        };
        self.wait_for.is_none_or(|last| place(key) <= place(last))
    }
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
