//! The credential for a registry, which `fcctl` finds with the caller's rights and sends to the
//! daemon over a pipe, never as a parameter of a call.

use crate::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Limit of a serialized [`Credential`]. Identity tokens of cloud registries have a few KiB.
pub const CREDENTIAL_BYTES_MAX: usize = 64 * 1024;

/// A text that no log and no error may show. `Debug` hides it, and `Display` does not exist.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns the text itself, to be sent to where it belongs.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// How a caller identifies itself to one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Credential {
    #[default]
    Anonymous,
    Basic {
        user: String,
        password: Secret,
    },
    /// A token that the registry's authorization service exchanges for short-lived tokens.
    Identity {
        token: Secret,
    },
}

impl Credential {
    /// Returns the bytes to write to the pipe. They must go nowhere else.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a credential is JSON")
    }

    /// Parses the output of [`Credential::to_bytes`]. The error leaves out serde's message, which
    /// could quote a secret.
    ///
    /// # Errors
    /// `invalid_request`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let parsed = match bytes.len() <= CREDENTIAL_BYTES_MAX {
            true => serde_json::from_slice(bytes).ok(),
            false => None,
        };
        let why = "the credential for the registry is malformed or too long";
        parsed.ok_or_else(|| Error::new(Kind::InvalidRequest, why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_hides_secrets_that_the_serialized_form_has() {
        let basic = Credential::Basic {
            user: "ann".into(),
            password: Secret::new("canary"),
        };
        let identity = Credential::Identity {
            token: Secret::new("canary"),
        };
        for credential in [basic, identity] {
            assert!(!format!("{credential:?}").contains("canary"));
            let bytes = credential.to_bytes();
            assert!(bytes.windows(6).any(|part| part == b"canary"));
            assert_eq!(Credential::from_bytes(&bytes).unwrap(), credential);
        }
    }

    #[test]
    fn malformed_bytes_are_refused_without_being_quoted() {
        let long = Credential::Identity {
            token: Secret::new("a".repeat(CREDENTIAL_BYTES_MAX)),
        };
        for bytes in [
            b"canary".to_vec(),
            br#"{"kind":"canary"}"#.to_vec(),
            br#"{"kind":"identity","token":["canary"]}"#.to_vec(),
            Vec::new(),
            long.to_bytes(),
        ] {
            let e = Credential::from_bytes(&bytes).unwrap_err();
            assert_eq!(e.kind(), Kind::InvalidRequest);
            assert!(!format!("{e:?}").contains("canary"));
        }
    }
}
