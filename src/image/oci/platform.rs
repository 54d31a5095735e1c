//! The platform of an image: operating system, architecture and variant.

use crate::error::{Error, Result};
use crate::host::text;
use serde::Deserialize;
use std::fmt;
use std::str::FromStr;

/// The platform to choose from an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    pub os: String,
    pub architecture: String,
    /// The variant of the CPU. If this is `None`, any variant is accepted, the lowest first.
    pub variant: Option<String>,
}

impl Default for Platform {
    fn default() -> Self {
        Self {
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            variant: None,
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = Error;

    /// Parses `os/arch[/variant]`.
    fn from_str(platform: &str) -> Result<Self> {
        let parts: Vec<&str> = platform.split('/').collect();
        let is_word = |part: &&str| {
            let is_allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
            !part.is_empty() && part.len() <= 32 && part.bytes().all(is_allowed)
        };
        if !(2..=3).contains(&parts.len()) || !parts.iter().all(is_word) {
            let shown = text::quoted(platform);
            return Err(Error::invalid(format!(
                "{shown} is not a platform: os/arch[/variant] is expected"
            ))
            .hint("use --platform linux/amd64"));
        }
        Ok(Self {
            os: parts[0].to_lowercase(),
            architecture: normal_architecture(&parts[1].to_lowercase()).to_owned(),
            variant: parts.get(2).map(|variant| variant.to_lowercase()),
        })
    }
}

fn normal_architecture(architecture: &str) -> &str {
    match architecture {
        "x86_64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The platform that a document claims for itself or for what it refers to.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Claimed {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub variant: Option<String>,
}

impl Claimed {
    /// Returns how well this platform suits the wanted one, or `None` if it does not fit. A lower
    /// number is better.
    ///
    /// A CPU of a variant runs the code for lower variants, so `linux/amd64/v3` prefers v3, and
    /// then v2 and v1. This is what containerd does. If no variant is wanted, the variant of the
    /// CPU is unknown, so the lowest is best, and variants that are not numbers come last.
    pub(super) fn rank(&self, wanted: &Platform) -> Option<u32> {
        let architecture = normal_architecture(&self.architecture);
        if self.os != wanted.os || architecture != wanted.architecture {
            return None;
        }
        let level = |variant: &str| level_of(architecture, variant);
        let variant = self.variant.as_deref().unwrap_or_default();
        let Some(wanted) = wanted.variant.as_deref() else {
            return Some(level(variant).unwrap_or(u32::MAX));
        };
        if variant.eq_ignore_ascii_case(wanted) {
            return Some(0);
        }
        level(wanted)?.checked_sub(level(variant)?)
    }

    pub(super) fn fits(&self, wanted: &Platform) -> bool {
        self.rank(wanted).is_some()
    }
}

/// Returns the number of a variant, such as 3 of `v3`. An image without a variant has the one that
/// the OCI specification calls the default: amd64 means v1, arm64 means v8, and arm means v7.
fn level_of(architecture: &str, variant: &str) -> Option<u32> {
    match (architecture, variant) {
        ("amd64", "") => Some(1),
        ("arm64", "") => Some(8),
        ("arm", "") => Some(7),
        // Docker also accepts a number alone.
        (_, variant) => variant.trim_start_matches(['v', 'V']).parse().ok(),
    }
}

impl fmt::Display for Claimed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |name: &str| -> String {
            let is_safe = |c: &char| c.is_ascii_graphic();
            name.chars().filter(is_safe).take(32).collect()
        };
        write!(f, "{}/{}", shown(&self.os), shown(&self.architecture))?;
        match self.variant.as_deref() {
            None | Some("") => Ok(()),
            Some(variant) => write!(f, "/{}", shown(variant)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platform_is_parsed_and_normalised() {
        for (text, full) in [
            ("linux/amd64", "linux/amd64"),
            ("Linux/x86_64", "linux/amd64"),
            ("linux/aarch64/v8", "linux/arm64/v8"),
        ] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), full);
        }
        for wrong in [
            "",
            "linux",
            "linux/",
            "/amd64",
            "a/b/c/d",
            "linux/a b",
            "linux/$x",
        ] {
            assert!(wrong.parse::<Platform>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn claim_fits_by_os_architecture_and_variant() {
        let claim = |architecture: &str, variant: Option<&str>| Claimed {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        };
        let wanted = |platform: &str| platform.parse::<Platform>().unwrap();
        assert!(claim("amd64", None).fits(&Platform::default()));
        assert!(claim("amd64", Some("v2")).fits(&Platform::default()));
        assert!(!claim("arm64", None).fits(&Platform::default()));
        assert!(claim("arm64", None).fits(&wanted("linux/arm64/v8")));
        assert!(claim("arm", Some("v7")).fits(&wanted("linux/arm/v7")));
        assert!(claim("arm", Some("v6")).fits(&wanted("linux/arm/v7")));
        assert!(!claim("arm", Some("v7")).fits(&wanted("linux/arm/v6")));
        assert!(!claim("amd64", Some("v3")).fits(&wanted("linux/amd64/v2")));
        assert!(!claim("amd64", Some("odd")).fits(&wanted("linux/amd64/v2")));
        assert!(claim("amd64", Some("odd")).fits(&wanted("linux/amd64/odd")));
        assert!(!claim("amd64", None).fits(&wanted("windows/amd64")));
    }
}
