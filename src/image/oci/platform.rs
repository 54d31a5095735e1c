//! The platform of an image: operating system, architecture and variant.

use crate::error::{Error, Result};
use crate::host::text;
use serde::Deserialize;
use std::fmt;
use std::str::FromStr;

/// What to choose from an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    pub os: String,
    pub architecture: String,
    /// Any variant is accepted if this is `None`.
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
    pub(super) fn fits(&self, wanted: &Platform) -> bool {
        let variant = self.variant.as_deref().unwrap_or_default();
        self.os == wanted.os
            && normal_architecture(&self.architecture) == wanted.architecture
            && wanted.variant.as_deref().is_none_or(|wanted| {
                variant == wanted || is_default(&self.architecture, wanted, variant)
            })
    }
}

/// True if an image without a variant has the variant `wanted`: arm64 means v8, and amd64 means v1.
fn is_default(architecture: &str, wanted: &str, variant: &str) -> bool {
    variant.is_empty()
        && matches!(
            (normal_architecture(architecture), wanted),
            ("arm64", "v8") | ("amd64", "v1")
        )
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
        assert!(!claim("arm", Some("v6")).fits(&wanted("linux/arm/v7")));
        assert!(!claim("amd64", None).fits(&wanted("windows/amd64")));
    }
}
