"""The chains that every manager's table has, in nftables' own language. `policy.table_text` fills in what differs."""

from __future__ import annotations

from string import Template

TABLE = Template("""table $table {
$sets
  set metadata { type ipv4_addr; elements = { $metadata } }
  set special { type ipv4_addr; flags interval; elements = { $special } }

  chain arriving {
    type filter hook prerouting priority raw; policy accept;
    iifname $links iifname . ip saddr != @guests goto spoofed
    iifname $links meta nfproto != ipv4 goto spoofed
  }
  chain redirecting {
    type nat hook prerouting priority dstnat; policy accept;
    iifname $links ip daddr $gateway meta l4proto { tcp, udp } th dport 53 redirect to :$resolver_port
  }
  chain entering_host {
    type filter hook input priority filter; policy accept;
    iifname $links goto guest_to_host
  }
  chain passing {
    type filter hook forward priority filter; policy accept;
    iifname $links goto guest_to_world
    oifname $links goto world_to_guest
  }
  chain leaving_host {
    type filter hook output priority filter; policy accept;
    oifname $links goto host_to_guest
  }
  chain masquerading {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr $addresses oifname != "rds*" masquerade
  }

  chain guest_to_host {
    ip daddr @metadata goto refuse
    ct original ip daddr @metadata goto refuse
    ip daddr $gateway meta l4proto { tcp, udp } th dport $resolver_port goto to_resolver
    iifname . ip daddr @narrow goto admit
    iifname . ip daddr @exact goto admit
    goto refuse
  }
  chain guest_to_world {
    ct state invalid drop
    ip daddr @metadata goto refuse
    ct original ip daddr @metadata goto refuse
    oifname "rds*" goto refuse
    iifname . ip daddr @narrow goto admit
    ip daddr @special goto refuse
    iifname . ip daddr @wide goto admit
    iifname . ip daddr @resolved goto admit
    ct state established iifname . ip daddr @opened accept
    goto refuse
  }
  chain world_to_guest {
    ct state related meta l4proto icmp accept
    ct state != established goto refuse_caller
    ct direction original goto refuse_caller
    oifname . ip saddr @narrow accept
    ip saddr @special goto refuse_caller
    oifname . ip saddr @wide accept
    oifname . ip saddr @opened accept
    goto refuse_caller
  }
  chain host_to_guest {
    ct state related accept
    ct state != established goto refuse_caller
    ct direction original goto refuse_caller
    ip saddr $gateway meta l4proto { tcp, udp } th sport $resolver_port accept
    oifname . ip saddr @narrow accept
    oifname . ip saddr @exact accept
    goto refuse_caller
  }
  chain to_resolver {
    update @dns_rate { iifname limit rate over $dns_rate/second burst $dns_burst packets } drop
    accept
  }
  chain admit {
    ct state new add @flows { iifname ct count over $flows_per_vm } goto refuse
    accept
  }
  chain spoofed {
    update @refusals { iifname counter }
    drop
  }
  chain refuse {
    update @refusals { iifname counter }
    meta l4proto tcp reject with tcp reset
    meta l4proto udp reject with icmpx port-unreachable
    reject with icmpx admin-prohibited
  }
  chain refuse_caller {
    meta l4proto tcp reject with tcp reset
    meta l4proto udp reject with icmpx port-unreachable
    reject with icmpx admin-prohibited
  }
}
""")
