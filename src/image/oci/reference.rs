//! Names of images in registries, in docker's grammar.
//!
//! A short name means what docker means by it: `alpine` is `docker.io/library/alpine:latest`. The
//! first component of a name is a domain only if it has a dot or a port, is `localhost`, or has a
//! capital letter.

use super::digest::Digest;
use crate::error::{Error, Result};
use crate::host::text;
use crate::ids::{DEFAULT_REGISTRY, split_registry};
use std::fmt;
use std::str::FromStr;

const OFFICIAL: &str = "library/";
const DEFAULT_TAG: &str = "latest";
/// Docker's size limit of domain and path together.
const NAME_BYTES_MAX: usize = 255;
const TAG_BYTES_MAX: usize = 128;

/// An image in a registry: a domain, a path and a tag or a digest or both. A digest determines what
/// is pulled, and a tag next to it is only a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Returns the registry's host, with its port if the reference has one.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Returns the repository in the registry, such as `library/alpine`.
    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Returns the shortest form that means the same, as docker shows it.
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        if self.domain != DEFAULT_REGISTRY {
            return full;
        }
        let short = &full[DEFAULT_REGISTRY.len() + 1..];
        let shortest = short.strip_prefix(OFFICIAL).unwrap_or(short);
        // A shortened path could look like a domain or like another official image.
        let means_this = |name: &&str| parse(name).as_ref() == Ok(self);
        let found = [shortest, short].into_iter().find(means_this);
        found.map_or(full.clone(), str::to_owned)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain, self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(reference: &str) -> Result<Self> {
        parse(reference).map_err(|why| {
            let shown = text::quoted(reference);
            Error::invalid(format!("{shown} is not a reference to an image: {why}"))
        })
    }
}

fn parse(reference: &str) -> Result<Reference, &'static str> {
    if reference.len() > NAME_BYTES_MAX + TAG_BYTES_MAX + 80 {
        return Err("it is too long");
    }
    let (rest, digest) = match reference.split_once('@') {
        Some((rest, digest)) => {
            let digest = digest.parse();
            let digest = digest.map_err(|_| "its digest is not sha256: and 64 digits")?;
            (rest, Some(digest))
        }
        None => (reference, None),
    };
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if let Some(tag) = tag
        && !is_tag(tag)
    {
        return Err("its tag has characters that no tag has");
    }
    let (domain, path) = split_domain(name);
    if !is_domain(&domain) {
        return Err("its registry is not a host name");
    }
    if let Some(why) = wrong_path(&path) {
        return Err(why);
    }
    if tag.is_none() && digest.is_none() && is_hexadecimal(name) {
        return Err("64 hexadecimal digits are an id, not a name");
    }
    if domain.len() + 1 + path.len() > NAME_BYTES_MAX {
        return Err("its name is longer than 255 characters");
    }
    let tag = match (tag, digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, None) => Some(DEFAULT_TAG.to_owned()),
        (None, Some(_)) => None,
    };
    Ok(Reference {
        domain,
        path,
        tag,
        digest,
    })
}

/// Splits a name into domain and path. Official images of Docker Hub are below `library`.
fn split_domain(name: &str) -> (String, String) {
    let (domain, path) = split_registry(name);
    if domain == DEFAULT_REGISTRY && !path.contains('/') {
        (domain.to_owned(), format!("{OFFICIAL}{path}"))
    } else {
        (domain.to_owned(), path.to_owned())
    }
}

fn is_tag(tag: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = tag.bytes();
    tag.len() <= TAG_BYTES_MAX
        && bytes.next().is_some_and(is_word)
        && bytes.all(|b| is_word(b) || b == b'.' || b == b'-')
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = match domain.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) => {
                let is_address = address.parse::<std::net::Ipv6Addr>().is_ok();
                return is_address
                    && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
            }
            None => return false,
        },
        None => match domain.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (domain, None),
        },
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    host.split('.').all(is_label) && port.is_none_or(is_port)
}

fn is_port(port: &str) -> bool {
    !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
}

/// Returns what is wrong with a path, or `None`. A component consists of lower-case letters and
/// digits, joined by one dot, one or two underscores, or any number of dashes.
fn wrong_path(path: &str) -> Option<&'static str> {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if path.bytes().any(|b| b.is_ascii_uppercase()) {
        return Some("its name must be in lower case");
    }
    for component in path.split('/') {
        let bytes = component.as_bytes();
        let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
            return Some("its name has an empty part");
        };
        if !is_word(*first) || !is_word(*last) {
            return Some("each part of its name must begin and end with a letter or a digit");
        }
        let separators = component.split(|c: char| c.is_ascii() && is_word(c as u8));
        for separator in separators.filter(|separator| !separator.is_empty()) {
            let dashes = separator.bytes().all(|b| b == b'-');
            if !dashes && !matches!(separator, "." | "_" | "__") {
                return Some("its name has characters that no name has");
            }
        }
    }
    None
}

fn is_hexadecimal(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[track_caller]
    fn check(reference: &str, full: &str, familiar: &str) {
        let parsed: Reference = reference.parse().unwrap();
        assert_eq!(parsed.to_string(), full);
        assert_eq!(parsed.familiar(), familiar);
        assert_eq!(full.parse::<Reference>().unwrap(), parsed);
        assert_eq!(familiar.parse::<Reference>().unwrap(), parsed);
    }

    #[test]
    fn reference_is_normalised_like_docker() {
        check("alpine", "docker.io/library/alpine:latest", "alpine:latest");
        check("gcc:13", "docker.io/library/gcc:13", "gcc:13");
        check("a/b", "docker.io/a/b:latest", "a/b:latest");
        check("docker.io/a", "docker.io/library/a:latest", "a:latest");
        check(
            "index.docker.io/a",
            "docker.io/library/a:latest",
            "a:latest",
        );
        check(
            "library/a/b",
            "docker.io/library/a/b:latest",
            "library/a/b:latest",
        );
        check("localhost/a:1", "localhost/a:1", "localhost/a:1");
        let doubled = "docker.io/docker.io/library/a:1";
        check(doubled, doubled, doubled);
        // The registry's name only begins like Docker Hub's.
        check("docker.iox/a", "docker.iox/a:latest", "docker.iox/a:latest");
        check("Host/a:1", "Host/a:1", "Host/a:1");
        check("host:5000/a", "host:5000/a:latest", "host:5000/a:latest");
        check("[::1]:5000/a", "[::1]:5000/a:latest", "[::1]:5000/a:latest");
        check(
            "ghcr.io/a__b/c--d.e:V1.0-x_",
            "ghcr.io/a__b/c--d.e:V1.0-x_",
            "ghcr.io/a__b/c--d.e:V1.0-x_",
        );
        let pinned = format!("docker.io/library/a@{DIGEST}");
        check(&format!("a@{DIGEST}"), &pinned, &format!("a@{DIGEST}"));
        let both = format!("docker.io/library/a:t@{DIGEST}");
        check(&format!("a:t@{DIGEST}"), &both, &format!("a:t@{DIGEST}"));
    }

    /// The command line finds the credential by the registry of the whole text, before anything
    /// has been parsed.
    #[test]
    fn credential_is_never_that_of_another_registry() {
        let parts = [
            "a",
            "A",
            "library",
            "localhost",
            "LOCALHOST",
            "docker.io",
            "Docker.io",
            "index.docker.io",
            "ghcr.io",
            "host:5000",
            "host:",
            "[::1]",
            "[::1]:5000",
            "a@b",
            "@",
            ":",
            ".",
            "",
            "x:1",
        ];
        let ends = [
            "",
            ":1",
            ":A",
            "@",
            &format!("@{DIGEST}"),
            &format!(":1@{DIGEST}"),
        ];
        let mut compared = 0;
        for first in parts {
            for second in parts {
                for third in ["", "/c", "/docker.io/c", "/C"] {
                    for end in ends {
                        for text in [
                            format!("{first}/{second}{third}{end}"),
                            format!("{first}{third}{end}"),
                        ] {
                            if let Ok(parsed) = text.parse::<Reference>() {
                                assert_eq!(split_registry(&text).0, parsed.domain(), "{text}");
                                compared += 1;
                            }
                        }
                    }
                }
            }
        }
        assert!(compared > 1000, "{compared}");
    }

    #[test]
    fn wrong_references_are_refused() {
        let long = "a".repeat(250);
        for wrong in [
            "",
            ":tag",
            "a:",
            "a:-x",
            "a:x/",
            "A",
            "a/B",
            "a//b",
            "/a",
            "a/",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a._b",
            "a b",
            "a\nb",
            "a:$(x)",
            "a@sha256:00",
            "a@sha512:00",
            "-oProxyCommand=x",
            "host:99999/a",
            "host:/a",
            "[::1/a",
            "[x]/a",
            "é",
            "..",
            "../a",
            "https://host.example/a",
            &"0".repeat(64),
            &long,
            &format!("a:{}", "t".repeat(129)),
        ] {
            let error = wrong.parse::<Reference>().unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument, "{wrong}");
        }
        format!("host.example/{}", "a".repeat(242))
            .parse::<Reference>()
            .unwrap();
    }
}
