//! Macros that declare a section of the configuration file once. The declaration gives the struct
//! that is parsed, its defaults, and its part of the reference that `fcd --print-config` prints, so
//! the three cannot differ.

use serde::Serialize;
use std::path::PathBuf;

/// One setting, as the reference describes it.
pub(crate) struct Setting {
    pub name: &'static str,
    /// The lines of its doc comment.
    pub doc: &'static [&'static str],
    /// The default as a TOML value.
    pub default: String,
    /// The possible values with their doc comments. Empty if the setting takes any value.
    pub choices: &'static [Choice],
}

/// One value of a setting with a fixed list of values.
pub(crate) struct Choice {
    pub name: &'static str,
    pub doc: &'static [&'static str],
}

/// A type that a setting can have.
pub(crate) trait Value: Serialize {
    const CHOICES: &'static [Choice] = &[];
}

impl Value for bool {}
impl Value for u32 {}
impl Value for u64 {}
impl Value for usize {}
impl Value for String {}
impl Value for PathBuf {}
impl Value for Vec<String> {}
impl Value for Vec<PathBuf> {}
impl Value for crate::ids::ImageRef {}

/// Formats a value as TOML. Strings, numbers, booleans and lists are written as in JSON.
pub(crate) fn toml_value<T: Value>(value: &T) -> String {
    serde_json::to_string(value).expect("settings are strings, numbers, booleans and lists of them")
}

/// Declares a section: `/// doc` and `name: Type = default` for each setting.
macro_rules! section {
    (
        $(#[doc = $section_doc:literal])+
        pub struct $section:ident {
            $($(#[doc = $doc:literal])+ $name:ident: $type:ty = $default:expr,)*
        }
    ) => {
        $(#[doc = $section_doc])+
        #[derive(Clone, Debug, ::serde::Deserialize, PartialEq)]
        #[serde(deny_unknown_fields, default)]
        pub struct $section {
            $($(#[doc = $doc])+ pub $name: $type,)*
        }

        impl Default for $section {
            fn default() -> Self {
                Self { $($name: $default,)* }
            }
        }

        impl $section {
            /// The lines of this section's doc comment.
            pub(crate) const DOC: &'static [&'static str] = &[$($section_doc),+];

            /// Returns the names and values of this section's settings, in the order of their
            /// declaration.
            pub(crate) fn values(&self) -> Vec<(&'static str, String)> {
                vec![$((stringify!($name), $crate::config::section::toml_value(&self.$name)),)*]
            }

            /// Returns the settings of this section, in the order of their declaration.
            pub(crate) fn settings() -> Vec<$crate::config::section::Setting> {
                let defaults = Self::default();
                vec![$($crate::config::section::Setting {
                    name: stringify!($name),
                    doc: &[$($doc),+],
                    default: $crate::config::section::toml_value(&defaults.$name),
                    choices: <$type as $crate::config::section::Value>::CHOICES,
                },)*]
            }
        }
    };
}

/// Declares the type of a setting with a fixed list of values: `/// doc` and `Variant = "name"` for
/// each. The first one is the default.
macro_rules! choices {
    (
        $(#[$meta:meta])*
        pub enum $type:ident {
            $(#[doc = $first_doc:literal])+ $first:ident = $first_name:literal,
            $($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, ::serde::Deserialize, ::serde::Serialize, PartialEq, Eq)]
        pub enum $type {
            $(#[doc = $first_doc])+ #[default] #[serde(rename = $first_name)] $first,
            $($(#[doc = $doc])+ #[serde(rename = $name)] $variant,)*
        }

        impl $crate::config::section::Value for $type {
            const CHOICES: &'static [$crate::config::section::Choice] = &[
                $crate::config::section::Choice { name: $first_name, doc: &[$($first_doc),+] },
                $($crate::config::section::Choice { name: $name, doc: &[$($doc),+] },)*
            ];
        }
    };
}

pub(crate) use {choices, section};
