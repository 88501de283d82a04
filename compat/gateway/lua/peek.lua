-- Shows what a receive would be given, changing nothing.
-- ARGV: group, max, deployment
local group, max, deployment = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local out = {}
local at = position(group) or '0-0'
local from, looked = '(' .. at, 0
while #out < max and looked < 1000 do
  local got = redis.call('XRANGE', stream, from, '+', 'COUNT', max - #out)
  if #got == 0 then break end
  for _, entry in ipairs(got) do
    local id, pairs = entry[1], entry[2]
    from, looked = '(' .. id, looked + 1
    local expires = tonumber(field(pairs, 'tercet-expires') or '0')
    local own = field(pairs, 'tercet-deployment') or ''
    if not load(id) and (expires == 0 or expires > now) and (deployment == '' or own == deployment) then
      out[#out + 1] = { id, '1', number(now), pairs }
    end
  end
end
if #out < max then
  local due = redis.call('ZRANGE', nexts, '-inf', now, 'BYSCORE', 'LIMIT', 0, max - #out)
  for _, id in ipairs(due) do
    local h = load(id)
    local got = h and redis.call('XRANGE', stream, id, id)
    if got and got[1] and (h.expires == 0 or h.expires > now) and (deployment == '' or h.deployment == deployment) then
      out[#out + 1] = { id, number(h.count + 1), number(now), got[1][2] }
    end
  end
end
return out
