//! Parsers for command-line values: sizes, durations, ports, environment variables.

use super::context::Env;
use crate::api::port::{Port, Protocol, loopback};
use crate::api::vm::{Init, Net, Restart};
use crate::error::{Error, Result};
use crate::ids::{LabelKey, LabelValue, Labels};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

/// Longest `--env-file` that is read.
const ENV_FILE_BYTES_MAX: u64 = 1024 * 1024;

/// True if a word is written as a path. No image, and no command after `--image`, is written so.
pub(super) fn is_path(word: &str) -> bool {
    word.starts_with('/') || matches!(word.split('/').next(), Some("." | ".."))
}

/// Parses a size in bytes: `512M`, `2G`, `1T`, `64K`, in powers of 1024, with or without `B` or
/// `iB`. A bare number is bytes.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err("a size is a number with K, M, G or T, such as 512M or 2G".to_owned()),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "a size is a number with K, M, G or T, such as 512M or 2G".to_owned())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "the size is too large".to_owned())
}

/// Parses bytes per second, written as a size. `none` is 0.
pub(super) fn parse_rate(text: &str) -> Result<u64, String> {
    if text == "none" {
        Ok(0)
    } else {
        parse_size(text.strip_suffix("/s").unwrap_or(text))
    }
}

/// Parses operations per second. `none` is 0.
pub(super) fn parse_count_rate(text: &str) -> Result<u64, String> {
    if text == "none" {
        Ok(0)
    } else {
        text.parse().map_err(|_| "use a number or none".to_owned())
    }
}

/// Parses a number of vCPUs.
pub(super) fn parse_vcpus(text: &str) -> Result<u32, String> {
    let form = || "the number of vCPUs must be a whole number, such as 2".to_owned();
    text.parse().map_err(|_| form())
}

/// Parses memory as a whole number of MiB: `512M`, `2G`.
pub(super) fn parse_mem_mib(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes > 0 && bytes % (1 << 20) == 0 {
        return Ok(bytes >> 20);
    }
    Err("memory is a whole number of MiB, such as 512M or 2G".to_owned())
}

/// Parses `[[ADDR:]HOST:]GUEST[/tcp|udp]`, as docker does, except that ADDR defaults to 127.0.0.1.
/// Without HOST, a free port is picked.
pub(super) fn parse_port(text: &str) -> Result<Port, String> {
    let form =
        || "use [[ADDR:]HOST:]GUEST[/udp], such as 8080:80, 0.0.0.0:8080:80 or 80".to_owned();
    let (rest, protocol) = match text.rsplit_once('/') {
        None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
        Some((rest, "udp")) => (rest, Protocol::Udp),
        Some(_) => return Err(form()),
    };
    let number = |text: &str| text.parse::<u16>().map_err(|_| form());
    let host = |text: &str| if text.is_empty() { Ok(0) } else { number(text) };
    let parts: Vec<&str> = rest.split(':').collect();
    let (host_addr, host_port, guest_port) = match parts.as_slice() {
        [guest] => (loopback(), 0, number(guest)?),
        [port, guest] => (loopback(), number(port)?, number(guest)?),
        [address, port, guest] => (
            address.parse().map_err(|_| form())?,
            host(port)?,
            number(guest)?,
        ),
        _ => return Err(form()),
    };
    if guest_port == 0 {
        Err(form())
    } else {
        Ok(Port {
            host_addr,
            host_port,
            guest_port,
            protocol,
        })
    }
}

/// A value of `--publish`: a port, or `auto` for those on which processes in the guest listen.
#[derive(Clone, Copy, Debug)]
pub(super) enum Publish {
    Port(Port),
    Auto,
}

/// Parses the same form as [`parse_port`], and `auto`.
pub(super) fn parse_publish(text: &str) -> Result<Publish, String> {
    match text {
        "auto" => Ok(Publish::Auto),
        _ => parse_port(text)
            .map(Publish::Port)
            .map_err(|e| format!("{e}, or auto")),
    }
}

/// Separates the ports from `auto`.
pub(super) fn published(all: &[Publish]) -> (Vec<Port>, bool) {
    let port = |one: &Publish| match one {
        Publish::Port(port) => Some(*port),
        Publish::Auto => None,
    };
    let ports: Vec<Port> = all.iter().filter_map(port).collect();
    let has_auto = ports.len() < all.len();
    (ports, has_auto)
}

/// A pattern for published ports. A part that is None matches anything.
#[derive(Clone, Copy, Debug)]
pub(super) struct PortPattern {
    host_addr: Option<Ipv4Addr>,
    host_port: Option<u16>,
    guest_port: u16,
    protocol: Protocol,
}

/// Parses the same form as [`parse_port`]. A part that is left out matches anything.
pub(super) fn parse_port_pattern(text: &str) -> Result<PortPattern, String> {
    let port = parse_port(text)?;
    Ok(PortPattern {
        host_addr: (text.matches(':').count() > 1).then_some(port.host_addr),
        host_port: Some(port.host_port).filter(|number| *number != 0),
        guest_port: port.guest_port,
        protocol: port.protocol,
    })
}

/// A value of `port rm`: a port, or `auto`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Removal {
    Pattern(PortPattern),
    Auto,
}

/// Parses the same form as [`parse_port_pattern`], and `auto`.
pub(super) fn parse_removal(text: &str) -> Result<Removal, String> {
    match text {
        "auto" => Ok(Removal::Auto),
        _ => parse_port_pattern(text)
            .map(Removal::Pattern)
            .map_err(|e| format!("{e}, or auto")),
    }
}

impl PortPattern {
    pub(super) fn matches(&self, port: &Port) -> bool {
        self.guest_port == port.guest_port
            && self.protocol == port.protocol
            && self.host_port.is_none_or(|number| number == port.host_port)
            && self.host_addr.is_none_or(|addr| addr == port.host_addr)
    }
}

impl fmt::Display for PortPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(addr) = self.host_addr {
            write!(f, "{addr}:")?;
        }
        match (self.host_port, self.host_addr) {
            (Some(number), _) => write!(f, "{number}:")?,
            (None, Some(_)) => f.write_str(":")?,
            (None, None) => {}
        }
        write!(f, "{}/{}", self.guest_port, self.protocol.name())
    }
}

pub(super) fn parse_net(text: &str) -> Result<Net, String> {
    match text {
        "nat" => Ok(Net::Nat),
        "none" => Ok(Net::None),
        _ => Err("use nat or none".to_owned()),
    }
}

pub(super) fn parse_init(text: &str) -> Result<Init, String> {
    match text {
        "fcd" => Ok(Init::Fcd),
        "image" => Ok(Init::Image),
        _ => Err("use fcd or image".to_owned()),
    }
}

pub(super) fn parse_restart(text: &str) -> Result<Restart, String> {
    match text {
        "no" => Ok(Restart::No),
        // A VM that its owner stopped stays stopped. docker calls this `unless-stopped`.
        "always" | "unless-stopped" => Ok(Restart::Always),
        _ => Err("use no, or always for a start after each reboot of the host".to_owned()),
    }
}

/// A label as a user writes it: `KEY=VALUE`, or `KEY` for an empty value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Label {
    pub key: LabelKey,
    pub value: LabelValue,
}

pub(super) fn parse_label(text: &str) -> Result<Label> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    Ok(Label {
        key: key.parse()?,
        value: value.parse()?,
    })
}

/// Collects labels. A later one replaces an earlier one with the same key.
pub(super) fn labels(labels: Vec<Label>) -> Result<Labels> {
    Labels::new(labels.into_iter().map(|label| (label.key, label.value)))
}

/// A change of a label: `KEY=VALUE` and `KEY` set it, and `KEY-` removes it, as with kubectl.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum LabelChange {
    Set(Label),
    Remove(LabelKey),
}

pub(super) fn parse_label_change(text: &str) -> Result<LabelChange> {
    match text.strip_suffix('-') {
        Some(key) if !text.contains('=') => Ok(LabelChange::Remove(key.parse()?)),
        _ => parse_label(text).map(LabelChange::Set),
    }
}

/// Parses `30s`, `5m`, `2h`, `250ms`. A bare number is seconds.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let ms: u64 = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("a duration is a number with ms, s, m or h, such as 30s".to_owned()),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "a duration is a number with ms, s, m or h, such as 30s".to_owned())?;
    number
        .checked_mul(ms)
        .map(Duration::from_millis)
        .ok_or_else(|| "the duration is too long".to_owned())
}

pub(super) fn timeout_ms(timeout: Option<Duration>) -> Option<u64> {
    timeout.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX))
}

/// Parses `K=V`, or `K` for the caller's own value. Returns None if the caller does not have the
/// variable.
fn env_entry(
    entry: &OsStr,
    caller: &dyn Fn(&str) -> Option<OsString>,
) -> Result<Option<(String, OsString)>> {
    let bytes = entry.as_bytes();
    let (key, value) = match bytes.iter().position(|b| *b == b'=') {
        Some(at) => (
            String::from_utf8_lossy(&bytes[..at]),
            Some(OsStr::from_bytes(&bytes[at + 1..]).to_owned()),
        ),
        None => (String::from_utf8_lossy(bytes), None),
    };
    let key = key.as_ref();
    let value = value.or_else(|| {
        if bytes.contains(&b'=') {
            None
        } else {
            caller(key)
        }
    });
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    if key.is_empty() || !key.bytes().all(plain) || key.as_bytes()[0].is_ascii_digit() {
        let e = Error::invalid(format!("environment variable {key:?}: not a name"));
        return Err(e.hint("use letters, digits and _, such as -e NAME=value"));
    }
    Ok(value.map(|v| (key.to_owned(), v)))
}

/// Merges `--env-file` and `-e`. `-e` overrides a file, and a later value overrides an earlier one.
pub(super) fn environment(
    files: &[std::path::PathBuf],
    entries: &[OsString],
    caller: &dyn Fn(&str) -> Option<OsString>,
) -> Result<Vec<(String, OsString)>> {
    let mut all = Vec::new();
    for path in files {
        let text = read_env_file(path)?;
        for (number, line) in text.split(|b| *b == b'\n').enumerate() {
            let line = line.strip_suffix(b"\r").unwrap_or(line).trim_ascii_start();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let at = || format!("{} line {}", path.display(), number + 1);
            all.extend(env_entry(OsStr::from_bytes(line), caller).map_err(|e| e.context(at()))?);
        }
    }
    for entry in entries {
        all.extend(env_entry(entry, caller)?);
    }
    let mut kept: Vec<(String, OsString)> = Vec::new();
    for (key, value) in all {
        match kept.iter_mut().find(|(k, _)| *k == key) {
            Some((_, v)) => *v = value,
            None => kept.push((key, value)),
        }
    }
    Ok(kept)
}

/// Returns a variable of the caller. Its value need not be UTF-8.
pub(super) fn own_variable(env: &Env, name: &str) -> Option<OsString> {
    let raw = || std::env::var_os(name).filter(|value| value.to_str().is_none());
    env(name).map(OsString::from).or_else(raw)
}

/// Like [`environment`], for the variables of a VM, which must be UTF-8.
pub(super) fn vm_environment(
    files: &[std::path::PathBuf],
    entries: &[OsString],
    env: &Env,
) -> Result<Vec<(String, String)>> {
    let all = environment(files, entries, &|name| own_variable(env, name))?;
    let text = |(name, value): (String, OsString)| match value.into_string() {
        Ok(value) => Ok((name, value)),
        Err(_) => Err(Error::invalid(format!("the value of {name} is not UTF-8"))
            .hint("pass it to each command instead: fcctl exec -e")),
    };
    all.into_iter().map(text).collect()
}

fn read_env_file(path: &Path) -> Result<Vec<u8>> {
    let doing = || format!("read the environment file {}", path.display());
    let file = std::fs::File::open(path).map_err(|e| path_error(doing(), e))?;
    let bytes = crate::host::command::read_bounded(file, ENV_FILE_BYTES_MAX + 1)
        .map_err(|e| Error::io(doing(), e))?;
    if bytes.len() as u64 > ENV_FILE_BYTES_MAX {
        return Err(Error::invalid(format!(
            "{}: it is larger than {ENV_FILE_BYTES_MAX} bytes",
            doing()
        )));
    }
    Ok(bytes)
}

/// Returns the error for a file of the caller that cannot be used. A missing file has its own kind.
pub(super) fn path_error(doing: String, e: std::io::Error) -> Error {
    if e.kind() == std::io::ErrorKind::NotFound {
        return Error::new(crate::error::Kind::PathNotFound, doing)
            .with_source(e)
            .hint("inspect it with ls -l");
    }
    Error::io(doing, e)
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    #[test]
    fn sizes_parse_with_units() {
        for (text, bytes) in [
            ("0", 0),
            ("512M", 512 << 20),
            ("2G", 2 << 30),
            ("2gib", 2 << 30),
            ("7k", 7 << 10),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "G", "1.5G", "-1", "1X", "99999999999T", "1 G", "0x10"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_mem_mib("2G"), Ok(2048));
        for bad in ["0", "1K", "1"] {
            assert!(parse_mem_mib(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_parse_with_none() {
        for (text, rate) in [("none", 0), ("0", 0), ("50M", 50 << 20), ("2G/s", 2 << 30)] {
            assert_eq!(parse_rate(text), Ok(rate), "{text}");
        }
        assert_eq!(
            (parse_count_rate("none"), parse_count_rate("1000")),
            (Ok(0), Ok(1000))
        );
        for bad in ["", "all", "-1", "50M/m", "/s"] {
            assert!(
                parse_rate(bad).is_err() && parse_count_rate(bad).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn ports_parse_like_docker() {
        let of = |text: &str| parse_port(text).map(|p| (p.to_string(), p.guest_port));
        for (text, host, guest) in [
            ("80", "127.0.0.1:0/tcp", 80),
            ("8080:80", "127.0.0.1:8080/tcp", 80),
            ("8080:80/tcp", "127.0.0.1:8080/tcp", 80),
            ("5353:53/udp", "127.0.0.1:5353/udp", 53),
            ("0.0.0.0:8080:80", "0.0.0.0:8080/tcp", 80),
            ("192.0.2.1::80", "192.0.2.1:0/tcp", 80),
        ] {
            assert_eq!(of(text), Ok((host.to_owned(), guest)), "{text}");
        }
        for bad in [
            "",
            "x",
            "0",
            "8080:0",
            "65536",
            "80:",
            ":80",
            "a:1:2",
            "1:2:3:4",
            "80/sctp",
            "80/",
            "::1:80:80",
            "-1:80",
            "/udp",
        ] {
            assert!(parse_port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn port_pattern_matches_what_is_left_out() {
        let port = parse_port("0.0.0.0:8080:80").unwrap();
        for (text, is_match) in [
            ("80", true),
            ("8080:80", true),
            ("0.0.0.0:8080:80/tcp", true),
            ("0.0.0.0::80", true),
            ("127.0.0.1::80", false),
            ("8081:80", false),
            ("80/udp", false),
            ("8080", false),
        ] {
            let pattern = parse_port_pattern(text).unwrap();
            assert_eq!(pattern.matches(&port), is_match, "{text}");
            let shown = pattern.to_string();
            assert_eq!(
                shown.trim_end_matches("/tcp"),
                text.trim_end_matches("/tcp")
            );
        }
        assert!(parse_port_pattern("http").is_err());
    }

    #[test]
    fn labels_parse_with_and_without_value() {
        let of = |text: &str| parse_label(text).map(|l| (l.key.to_string(), l.value.to_string()));
        for (text, key, value) in [
            ("ci", "ci", ""),
            ("ci=", "ci", ""),
            ("ci=yes", "ci", "yes"),
            ("a.b/c=d=e, f", "a.b/c", "d=e, f"),
            ("ci=a-", "ci", "a-"),
        ] {
            assert_eq!(
                of(text).unwrap(),
                (key.to_owned(), value.to_owned()),
                "{text}"
            );
        }
        for bad in ["", "=x", "ci-", "a b=c", "a=\n"] {
            assert!(of(bad).is_err(), "{bad}");
        }
        let removed = |text: &str| match parse_label_change(text) {
            Ok(LabelChange::Remove(key)) => Some(key.to_string()),
            _ => None,
        };
        assert_eq!(removed("ci-"), Some("ci".to_owned()));
        assert_eq!(
            (removed("ci=a-"), removed("ci"), removed("-")),
            (None, None, None)
        );
        assert!(parse_label_change("-").is_err() && parse_label_change("ci--").is_err());
    }

    #[test]
    fn durations_parse_with_units() {
        for (text, ms) in [
            ("250ms", 250),
            ("3", 3000),
            ("3s", 3000),
            ("2m", 120_000),
            ("1h", 3_600_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(ms)),
                "{text}"
            );
        }
        for bad in ["", "s", "1d", "-1", "1.5s", "99999999999999999999h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[track_caller]
    fn check(files: &[&str], entries: &[&str], expected: Expect) {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..files.len())
            .map(|i| dir.path().join(i.to_string()))
            .collect();
        for (path, text) in paths.iter().zip(files) {
            std::fs::write(path, text).unwrap();
        }
        let caller = |k: &str| (k == "MINE").then(|| "from me".into());
        let entries: Vec<OsString> = entries.iter().map(OsString::from).collect();
        let text = match environment(&paths, &entries, &caller) {
            Ok(all) => all.iter().map(|(k, v)| format!("{k}={v:?}\n")).collect(),
            Err(e) => format!("{e}\n").replace(dir.path().to_str().unwrap(), "DIR"),
        };
        expected.assert_eq(&text);
    }

    #[test]
    fn environment_flag_overrides_file() {
        check(
            &["# c\n\nA=1\nB=two words = x\nMINE\n"],
            &["A=3", "NOT_MINE", "E="],
            expect![[r#"
                A="3"
                B="two words = x"
                MINE="from me"
                E=""
            "#]],
        );
        check(
            &[],
            &["=x"],
            expect![[r#"
            environment variable "": not a name
        "#]],
        );
        check(
            &["A=1\n1B=2\n"],
            &[],
            expect![[r#"
            DIR/0 line 2: environment variable "1B": not a name
        "#]],
        );
        let e = environment(&["/nonexistent/f".into()], &[], &|_| None).unwrap_err();
        assert_eq!(e.kind(), crate::error::Kind::PathNotFound);
    }
}
