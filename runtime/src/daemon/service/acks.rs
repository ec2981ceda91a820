//! Acknowledgements: each goes out by the connection that its message came by, in the order of the messages.

use super::Service;
use crate::mqtt::{Ack, Door, Link};

impl Service {
    /// Acknowledges a message now or, when the link has no room, at the next tick: the ones after it wait for it.
    pub(super) fn ack(&mut self, ack: Option<Ack>) {
        self.acks.extend(ack);
        while let Some(&ack) = self.acks.front()
            && self
                .link_of(ack)
                .is_none_or(|link| !link.is_alive() || link.ack(ack))
        {
            self.acks.pop_front();
        }
    }

    /// The connection by which a message came; `None` when it is gone.
    pub(super) fn link_of(&self, ack: Ack) -> Option<&Link> {
        match (ack.door(), &self.pool) {
            (Door::Own, _) => Some(&self.link),
            (door, Some(pool)) => pool.link(door),
            (_, None) => None,
        }
    }

    /// A connection is lost: what came by it and was not acknowledged comes again.
    pub(super) fn forget_unacknowledged(&mut self, door: Door) {
        let is_its = |ack: Option<Ack>| ack.is_some_and(|ack| ack.door() == door);
        self.refusals.retain(|(ack, _)| !is_its(*ack));
        self.unpublished.retain(|answer| !is_its(answer.ack));
    }
}
