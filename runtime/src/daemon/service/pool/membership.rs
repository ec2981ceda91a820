//! Membership: when this device is in the pool, and how it leaves.
//!
//! In: connections, the clock, an order to leave. Out: a retained message about this device, requests given back.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Pool, Service, open};
use crate::journal::table::Stage;
use crate::mqtt::{Door, Link, Outgoing};
use crate::wire::Reply;
use crate::wire::pool::{Member, Membership};

/// The count of held requests is not said more often than this, unless it begins or ends.
const BETWEEN: Duration = Duration::from_millis(250);
/// The broker has nothing more for a session on which nothing has come for so long.
pub(super) const QUIET: Duration = Duration::from_secs(1);

/// Why a member leaves.
pub(super) enum Why {
    /// The daemon ends.
    Stopped,
    /// It can answer nothing for a while.
    Broken,
    /// An administrator said so.
    Ordered { id: String, reply: Reply },
}

/// A member on its way out.
pub(super) struct Leaving {
    why: Why,
    /// The link had room for the order.
    unsubscribed: bool,
    since: Instant,
    pub(super) given_back: u64,
}

/// What a member's will says.
pub(super) fn gone() -> Vec<u8> {
    payload(Membership::Gone, 0)
}

fn payload(state: Membership, held: u64) -> Vec<u8> {
    // A struct of a name and a number: this cannot fail.
    serde_json::to_vec(&Member { state, held }).unwrap_or_default()
}

impl Service {
    /// Four times a second.
    pub(in super::super) fn look_after_pool(&mut self) {
        let broken = self.is_broken();
        let table = &self.table;
        let Some(pool) = &mut self.pool else { return };
        pool.taken
            .retain(|key| matches!(table.stage(key), Some(Stage::Accepted(_))));
        let leaving = pool.leaving.as_ref();
        let was_broken = leaving.is_some_and(|leaving| matches!(leaving.why, Why::Broken));
        if broken && leaving.is_none() && pool.fleet.has_others() {
            self.leave(Why::Broken);
        } else if pool.out && was_broken && !broken {
            self.come_back();
        }
        self.expire_held();
        self.give_back();
        self.left();
        self.settle_estate();
        self.adopt();
        self.adopted();
        self.fill_from_pool();
    }

    pub(super) fn pool_connected(&mut self, door: Door) {
        if door == Door::Adopted {
            return self.adoption_begins();
        }
        if let Some(pool) = &mut self.pool {
            tracing::info!("in the pool");
            (pool.connected, pool.said, pool.reason) = (true, None, None);
        }
    }

    pub(super) fn pool_disconnected(&mut self, door: Door) {
        let Some(pool) = &mut self.pool else { return };
        match door {
            Door::Pool => pool.connected = false,
            // It is back, or the broker is away: not to be tried again at once.
            Door::Adopted => pool.adopting = None,
            Door::Own => {}
        }
    }

    /// Says where this member stands, where that is new.
    pub(super) fn say_membership(&mut self) {
        let Some(pool) = &self.pool else { return };
        if !self.connected || !pool.connected || pool.out {
            return;
        }
        let member = Member {
            state: match pool.leaving {
                Some(_) => Membership::Leaving,
                None => Membership::In,
            },
            held: pool.held.len() as u64,
        };
        let due = pool.said.as_ref().is_none_or(|(said, at)| {
            let matters = said.state != member.state || (said.held == 0) != (member.held == 0);
            *said != member && (matters || at.elapsed() > BETWEEN)
        });
        if due
            && self.say_member(&self.config.device.clone(), payload(member.state, member.held))
            && let Some(pool) = &mut self.pool
        {
            pool.said = Some((member, Instant::now()));
        }
    }

    pub(super) fn say_member(&mut self, device: &str, payload: Vec<u8>) -> bool {
        match self.pool.as_ref().map(|pool| pool.topics.member(device)) {
            Some(topic) => self.retain(topic, payload),
            None => false,
        }
    }

    /// The daemon ends: what it has not begun goes to the others. Alone, it keeps its place and what the broker has for it.
    pub(in super::super) fn leave_to_stop(&mut self) {
        if self.pool.as_ref().is_some_and(|pool| pool.fleet.has_others()) {
            self.leave(Why::Stopped);
        }
    }

    /// An administrator takes this device out of the pool.
    pub(in super::super) fn leave_as_ordered(&mut self, id: String, reply: Reply) {
        self.leave(Why::Ordered { id, reply });
    }

    fn leave(&mut self, why: Why) {
        let Some(pool) = &mut self.pool else { return };
        tracing::info!("leaving the pool");
        pool.leaving = Some(Leaving {
            unsubscribed: pool.link.unsubscribe(),
            why,
            since: Instant::now(),
            given_back: 0,
        });
        self.give_back();
    }

    /// Whether it is out of the pool, or on its way.
    pub(in super::super) fn has_left_pool(&self) -> bool {
        self.pool
            .as_ref()
            .is_some_and(|pool| pool.out || pool.leaving.is_some())
    }

    /// Whether it is out of the pool.
    pub(in super::super) fn is_out_of_pool(&self) -> bool {
        self.pool.as_ref().is_some_and(|pool| pool.out)
    }

    /// Whether this device may end as far as the pool is concerned.
    pub(in super::super) fn is_done_with_pool(&self) -> bool {
        self.pool.as_ref().is_none_or(|pool| {
            pool.taken.is_empty() && (pool.out || pool.leaving.is_none() || !self.connected)
        })
    }

    /// Whether it has work of the pool to finish.
    pub(in super::super) fn owes_pool(&self) -> bool {
        self.pool.as_ref().is_some_and(|pool| !pool.taken.is_empty())
    }

    /// Is out once the broker has nothing more for it and, where that was ordered, all that it took is answered.
    fn left(&mut self) {
        let handing = self.is_handing(|_| true);
        let Some(pool) = &mut self.pool else { return };
        let Some(leaving) = &mut pool.leaving else { return };
        if !leaving.unsubscribed {
            leaving.unsubscribed = pool.link.unsubscribe();
            leaving.since = Instant::now();
        }
        let ordered = matches!(leaving.why, Why::Ordered { .. });
        let quiet = pool.heard.elapsed() > QUIET && leaving.since.elapsed() > QUIET;
        let owes = ordered && !pool.taken.is_empty();
        if pool.out
            || !pool.connected
            || !self.connected
            || !quiet
            || handing
            || owes
            || !pool.held.is_empty()
        {
            return;
        }
        let given_back = leaving.given_back;
        tracing::info!("out of the pool; {given_back} requests went back to it");
        (pool.out, pool.connected) = (true, false);
        close(&pool.link);
        let order = match &leaving.why {
            Why::Ordered { id, reply } => Some((id.clone(), reply.clone())),
            Why::Stopped | Why::Broken => None,
        };
        self.say_member(&self.config.device.clone(), Vec::new());
        if let Some((id, reply)) = order {
            let result = json!({"in_pool": false, "given_back": given_back});
            self.say(reply, Self::command_body(&id, "drain", result));
        }
    }

    /// Joins the pool again.
    pub(in super::super) fn come_back(&mut self) {
        let Some(pool) = &mut self.pool else { return };
        match open(pool.options.clone(), pool.events.clone()) {
            Ok(link) => {
                (pool.link, pool.out, pool.leaving, pool.said) = (link, false, None, None);
            }
            Err(error) => tracing::error!("pool: {error}"),
        }
    }

    /// Tells the others that this member is gone, and closes its connections.
    pub(in super::super) async fn gone_from_pool(pool: &Pool, device: &str, own: &Link, token: u64) {
        if !pool.out {
            own.publish(Outgoing {
                topic: pool.topics.member(device),
                payload: gone(),
                retain: true,
                token: Some(token),
                content_type: Some("application/json"),
                ..Outgoing::default()
            });
        }
        pool.link.close().await;
    }
}

pub(super) fn close(link: &Link) {
    let link = link.clone();
    tokio::spawn(async move { link.close().await });
}
