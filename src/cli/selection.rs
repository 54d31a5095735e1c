//! Chooses VMs: by name, or with `--filter` by their properties.
//!
//! Terms of the same kind are alternatives, and terms of different kinds must all match, as with
//! docker. Labels are the exception: a VM must have all of them. fcctl lists the VMs, compares them
//! with the filter, and then refers to those that match by ID. A VM that takes over one of their
//! names in between is therefore not affected.

use super::connector::Connector;
use super::output::MatchedText;
use super::printer::Printer;
use crate::api::vm::{VmBrief, VmListBrief, VmListRequest, VmState};
use crate::client::{Client, Result};
use crate::error::Error;
use crate::host::text::{printable, quoted};
use crate::ids::{LabelKey, LabelValue};
use serde::Serialize;
use std::str::FromStr;

/// The keys of a filter, for hints.
const KEYS: &str = "label=KEY, label=KEY=VALUE, state=STATE, name=NAME, image=IMAGE, id=ID";

/// The VMs that a command is for.
#[derive(clap::Args, Debug)]
pub(super) struct Selection {
    /// Names, IDs, or ID prefixes
    #[arg(
        required_unless_present = "filters",
        conflicts_with = "filters",
        value_name = "VM"
    )]
    pub vms: Vec<String>,
    #[command(flatten)]
    pub filter: Filter,
}

/// The options that choose VMs by their properties.
#[derive(clap::Args, Debug, Default)]
pub(super) struct Filter {
    /// Choose VMs instead of naming them: label=KEY[=VALUE], state=STATE, name=NAME, image=IMAGE or
    /// id=ID. NAME and IMAGE may contain *
    #[arg(id = "filters", long = "filter", value_name = "KEY=VALUE")]
    terms: Vec<Terms>,
}

/// The terms of one `--filter`, separated by commas.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    text: String,
    terms: Vec<Term>,
}

#[derive(Clone, Debug, PartialEq)]
enum Term {
    State(VmState),
    /// `state=paused`. The API has no such state, but a flag of running VMs.
    Paused,
    Label(LabelKey, Option<LabelValue>),
    Name(MatchedText),
    Image(MatchedText),
    Id(String),
}

/// A VM that a command acts on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Target {
    /// The name or ID that identifies the VM to the daemon.
    pub vm: String,
    /// The VM's name in messages.
    pub shown: String,
}

impl FromStr for Terms {
    type Err = Error;

    /// Splits the text at commas. A comma begins a new term only if a known key follows, so values
    /// may contain commas.
    fn from_str(text: &str) -> Result<Self, Error> {
        let mut parts: Vec<String> = Vec::new();
        for part in text.split(',') {
            match parts.last_mut() {
                Some(last) if !begins_term(part) => last.extend([",", part]),
                _ => parts.push(part.to_owned()),
            }
        }
        let terms = parts.iter().map(|part| Term::parse(part));
        Ok(Self {
            terms: terms.collect::<Result<_, _>>()?,
            text: text.to_owned(),
        })
    }
}

fn begins_term(text: &str) -> bool {
    let key = text.split_once('=').map(|(key, _)| key);
    key.is_some_and(|key| Key::find(key).is_some())
}

#[derive(Clone, Copy)]
enum Key {
    Label,
    State,
    Name,
    Image,
    Id,
}

impl Key {
    /// Finds a key by fcctl's name or docker's.
    fn find(word: &str) -> Option<Self> {
        match word {
            "label" => Some(Self::Label),
            "state" | "status" => Some(Self::State),
            "name" => Some(Self::Name),
            "image" | "ancestor" => Some(Self::Image),
            "id" => Some(Self::Id),
            _ => None,
        }
    }
}

impl Term {
    fn parse(text: &str) -> Result<Self, Error> {
        let unknown = || Error::invalid(format!("{} is not a filter", quoted(text))).hint(KEYS);
        let (word, value) = text.split_once('=').ok_or_else(unknown)?;
        let key = Key::find(word).ok_or_else(unknown)?;
        if value.is_empty() {
            return Err(Error::invalid(format!("the filter {word}= has no value")).hint(KEYS));
        }
        Ok(match key {
            Key::Label => match value.split_once('=') {
                Some((key, value)) => Self::Label(key.parse()?, Some(value.parse()?)),
                None => Self::Label(value.parse()?, None),
            },
            Key::State if value == "paused" => Self::Paused,
            Key::State => Self::State(parse_state(value).map_err(|text| {
                Error::invalid(format!("{} is not a state", quoted(value))).hint(text)
            })?),
            Key::Name => Self::Name(MatchedText::new(value)),
            Key::Image => Self::Image(MatchedText::new(value)),
            Key::Id => Self::Id(value.to_owned()),
        })
    }

    fn matches(&self, vm: &VmBrief<'_>) -> bool {
        match self {
            Self::State(state) => vm.state == *state,
            Self::Paused => vm.paused,
            Self::Label(key, wanted) => vm
                .labels
                .get(key)
                .is_some_and(|value| wanted.as_ref().is_none_or(|wanted| wanted == value)),
            Self::Name(name) => name.matches(vm.name.as_str()),
            Self::Image(image) => {
                let name = &*vm.image;
                image.matches(name.as_str()) || image.matches(name.parts().repository)
            }
            Self::Id(id) => vm.id.as_str().starts_with(id.as_str()),
        }
    }

    /// Returns a number for the kind of the term. Terms of the same kind are alternatives.
    fn kind(&self) -> u8 {
        match self {
            Self::State(_) | Self::Paused => 0,
            Self::Name(_) => 1,
            Self::Image(_) => 2,
            Self::Id(_) => 3,
            Self::Label(..) => 4,
        }
    }
}

pub(super) fn parse_state(text: &str) -> Result<VmState, String> {
    let names = VmState::ALL.map(VmState::name);
    VmState::ALL
        .into_iter()
        .find(|s| s.name() == text)
        .ok_or_else(|| format!("a state is one of {}", names.join(", ")))
}

impl Filter {
    pub(super) fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    fn terms(&self) -> impl Iterator<Item = &Term> {
        self.terms.iter().flat_map(|terms| &terms.terms)
    }

    /// True if the filter names a state. The list must then include VMs that are not running.
    pub(super) fn has_state(&self) -> bool {
        self.terms().any(|term| term.kind() == 0)
    }

    pub(super) fn matches(&self, vm: &VmBrief<'_>) -> bool {
        self.terms().all(|term| match term {
            Term::Label(..) => term.matches(vm),
            _ => {
                let mut alternatives = self.terms().filter(|other| other.kind() == term.kind());
                alternatives.any(|other| other.matches(vm))
            }
        })
    }

    /// Returns the filter as the user wrote it.
    fn text(&self) -> String {
        let texts = self.terms.iter().map(|terms| printable(&terms.text));
        texts.collect::<Vec<_>>().join(",")
    }
}

impl Selection {
    /// Returns the named VMs, or those that the filter chooses. Prints a remark if there are none.
    pub(super) fn targets(
        &self,
        connector: &mut Connector,
        printer: &mut Printer,
    ) -> Result<Vec<Target>> {
        targets(connector, printer, &self.vms, &self.filter)
    }
}

/// Does what [`Selection::targets`] does, for a command whose names are optional.
pub(super) fn targets(
    connector: &mut Connector,
    printer: &mut Printer,
    vms: &[String],
    filter: &Filter,
) -> Result<Vec<Target>> {
    if filter.is_empty() {
        let named = |vm: &String| Target {
            vm: vm.clone(),
            shown: vm.clone(),
        };
        return Ok(vms.iter().map(named).collect());
    }
    let request = VmListRequest {
        all: true,
        brief: true,
        ..Default::default()
    };
    let mut listed = connector.connect(printer)?.list::<VmListBrief>(request)?;
    listed.retain(|vm| filter.matches(vm));
    if listed.is_empty() {
        printer.note(&format!("no VM matches {}", filter.text()));
    }
    let target = |vm: &VmBrief<'_>| Target {
        vm: vm.id.to_string(),
        shown: vm.name.to_string(),
    };
    Ok(listed.iter().map(target).collect())
}

/// Runs `each` for every chosen VM, as [`Connector::for_each`] does. With `--json`, a filter always
/// makes an array, even of one VM or none.
pub(super) fn for_each_vm<T: Serialize>(
    connector: &mut Connector,
    printer: &mut Printer,
    selection: &Selection,
    each: impl FnMut(&mut Printer, &mut Client, &Target) -> Result<T>,
) -> Result<u8> {
    let targets = selection.targets(connector, printer)?;
    let is_one = selection.filter.is_empty() && targets.len() == 1;
    connector.for_all(printer, &targets, is_one, each)
}

#[cfg(test)]
#[path = "selection_tests.rs"]
mod tests;
