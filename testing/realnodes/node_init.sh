#!/bin/bash
# First process of a node, in its own network, process, mount, hostname and IPC namespaces.
# See node.py for its variables. When it ends, the kernel ends every process in these namespaces.
set -eu
mount -t proc proc /proc
mount --make-rshared /
mkdir -p /var/lib/kubelet /var/lib/containerd /var/lib/cni /etc/cni /var/log/pods /var/log/containers
for folder in kubelet containerd cni; do
    mkdir -p "$FOLDER/$folder"
    mount --bind "$FOLDER/$folder" "/var/lib/$folder"
done
mkdir -p "$FOLDER/etc-cni/net.d" "$FOLDER/log/pods" "$FOLDER/log/containers"
mount --bind "$FOLDER/etc-cni" /etc/cni
mount --bind "$FOLDER/log" /var/log
mount -t tmpfs run /run
mkdir -p /run/lock /run/sysctl
hostname "$NODE"

# The kubelet would change these settings for the complete machine. Mount files with the expected values over them.
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    file="/run/sysctl/$(basename "${setting%=*}")"
    echo "${setting#*=}" > "$file"
    mount --bind "$file" "/proc/sys/${setting%=*}"
done

# node.py connects the other end of the link.
ip link set lo up
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip address add "$ADDRESS/24" dev eth0
ip link set eth0 up
ip route add default via "$GATEWAY"
echo 1 > /proc/sys/net/ipv4/ip_forward

cat > /etc/cni/net.d/10-nodes.conflist << EOF
{"cniVersion": "1.0.0", "name": "nodes", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "$PODS"}]], "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": "/run/cni-ipam"}}]}
EOF
echo "nameserver $GATEWAY" > "$FOLDER/resolv.conf"

export PATH="$SHIMS:$PATH"
"$CONTAINERD" --config "$FOLDER/containerd.toml" > "$LOGS/containerd-$NODE.log" 2>&1 &
until "$CTR" version > /dev/null 2>&1; do sleep 0.1; done
"$KUBE_PROXY" --config "$FOLDER/proxy.json" > "$LOGS/kube-proxy-$NODE.log" 2>&1 &
"$KUBELET" --config "$FOLDER/kubelet.json" --kubeconfig "$KUBECONFIG" --hostname-override "$NODE" \
    --node-ip "$ADDRESS" > "$LOGS/kubelet-$NODE.log" 2>&1 &
while :; do wait -n || sleep 1; done
