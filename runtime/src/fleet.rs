//! The fleet, as one member of a pool knows it: who is in, who holds more than it can run, who is gone.
//!
//! In: the retained messages of all members. Out: whom to ask for work, and whose requests to fetch from the broker. Pure:
//! no clock, no connection.

use std::collections::BTreeMap;

use crate::wire::pool::{Member, Membership};

/// Members by name.
#[derive(Clone, Debug)]
pub struct Fleet {
    device: String,
    members: BTreeMap<String, Member>,
}

impl Fleet {
    /// A fleet of which `device` knows nothing yet.
    pub fn new(device: &str) -> Self {
        Self {
            device: device.to_owned(),
            members: BTreeMap::new(),
        }
    }

    /// A member has said something of itself; an empty payload is a farewell. What cannot be read changes nothing.
    pub fn hear(&mut self, device: &str, payload: &[u8]) {
        if payload.is_empty() {
            self.members.remove(device);
        } else if let Ok(member) = serde_json::from_slice(payload) {
            self.members.insert(device.to_owned(), member);
        }
    }

    fn others(&self) -> impl Iterator<Item = (&str, &Member)> {
        let others = self.members.iter().filter(|(name, _)| **name != self.device);
        others.map(|(name, member)| (name.as_str(), member))
    }

    /// Whether anybody else takes requests.
    pub fn has_others(&self) -> bool {
        self.others().any(|(_, member)| member.state == Membership::In)
    }

    /// The one that holds the most, and is there to give it.
    pub fn richest(&self) -> Option<&str> {
        self.others()
            .filter(|(_, member)| member.held > 0 && member.state != Membership::Gone)
            .max_by_key(|(_, member)| member.held)
            .map(|(name, _)| name)
    }

    /// Whether a member holds requests, as far as is known.
    pub fn holds(&self, device: &str) -> bool {
        self.members.get(device).is_some_and(|member| member.held > 0)
    }

    /// It was asked for so many, whatever it said.
    pub fn gave(&mut self, device: &str, requests: u64) {
        if let Some(member) = self.members.get_mut(device) {
            member.held = member.held.saturating_sub(requests);
        }
    }

    /// One that is gone, where it is for this device to fetch what the broker holds for it: the first by name of those that
    /// are in does, so that it is one only.
    pub fn orphan(&self) -> Option<&str> {
        let first = self
            .others()
            .filter(|(_, member)| member.state == Membership::In)
            .all(|(name, _)| self.device.as_str() < name);
        let mut gone = self
            .others()
            .filter(|(_, member)| member.state == Membership::Gone);
        gone.next().filter(|_| first).map(|(name, _)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet(device: &str, said: &[(&str, &str)]) -> Fleet {
        let mut fleet = Fleet::new(device);
        for (name, payload) in said {
            fleet.hear(name, payload.as_bytes());
        }
        fleet
    }

    const IN: &str = r#"{"state": "in", "held": 0}"#;
    const GONE: &str = r#"{"state": "gone", "held": 3}"#;

    #[test]
    fn who_holds_the_most_is_asked() {
        let mut fleet = fleet(
            "b",
            &[
                ("a", r#"{"state": "in", "held": 2}"#),
                ("b", r#"{"state": "in", "held": 9}"#),
                ("c", r#"{"state": "leaving", "held": 3, "more": true}"#),
                ("d", GONE),
                ("e", "nonsense"),
            ],
        );
        assert_eq!(fleet.richest(), Some("c"));
        fleet.gave("c", 8);
        assert_eq!(fleet.richest(), Some("a"));
        fleet.hear("a", b"");
        assert_eq!(fleet.richest(), None);
        assert!(!fleet.holds("a") && fleet.holds("b"));
    }

    #[test]
    fn one_member_fetches_what_is_left_of_another() {
        let said = [("a", GONE), ("b", IN), ("c", IN)];
        assert_eq!(fleet("b", &said).orphan(), Some("a"));
        assert_eq!(fleet("c", &said).orphan(), None);
        // Its own will of before is no orphan's, and alone it is the first.
        assert_eq!(fleet("a", &[("a", GONE)]).orphan(), None);
        let alone = fleet("z", &[("a", GONE), ("z", IN)]);
        assert_eq!((alone.orphan(), alone.has_others()), (Some("a"), false));
    }
}
